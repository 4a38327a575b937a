"""Builds sdist and wheel in a temporary folder and checks their files and metadata.

Exits with 1 if the sdist holds links or lacks a module, if the wheel built from the sdist differs from the wheel built
from the tree, or if `twine check` fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SKIPPED = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist")


def main() -> None:
    """Build, compare, check."""
    with tempfile.TemporaryDirectory(prefix="coldstill-build-") as name:
        folder = Path(name)
        # A copy, because setuptools writes `build` and `*.egg-info` beside pyproject.toml.
        tree = shutil.copytree(REPOSITORY, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
        from_tree = build("wheel", tree, folder / "from_tree")
        sdist = build("sdist", tree, folder / "sdist")
        with tarfile.open(sdist) as archive:
            links = [member.name for member in archive if member.issym() or member.islnk()]
            archive.extractall(folder / "unpacked", filter="data")
        (unpacked,) = (folder / "unpacked").iterdir()
        from_sdist = build("wheel", unpacked, folder / "from_sdist")
        # Links in the sdist would be dead once unpacked elsewhere; tar stores the files behind them.
        problems = [f"the sdist holds a link: {link}" for link in links]
        tree_files, sdist_files = files_of(from_tree), files_of(from_sdist)
        for path in sorted(tree_files.keys() | sdist_files.keys()):
            if tree_files.get(path) != sdist_files.get(path):
                problems.append(f"{path} differs between the wheels built from the tree and from the sdist")
        wanted = {path.relative_to(tree).as_posix() for path in source_files(tree)}
        problems += [f"the wheel lacks {path}" for path in sorted(wanted - tree_files.keys())]
        if problems:
            raise SystemExit("\n".join(problems))
        run("-m", "twine", "check", "--strict", str(sdist), str(from_sdist))
        print(f"{sdist.name}, {from_tree.name}: {len(tree_files)} files, equal from tree and sdist")


def source_files(tree: Path) -> list[Path]:
    """All modules of the package, through its links to the rooms."""
    rooms = [tree / "coldstill", *(path for path in (tree / "coldstill").iterdir() if path.is_symlink())]
    return [path for room in rooms for path in room.rglob("*.py")]


def build(kind: str, source: Path, output: Path) -> Path:
    """Build the sdist or wheel of `source` and return its path."""
    run("-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(output), str(source))
    (path,) = output.iterdir()
    return path


def files_of(wheel: Path) -> dict[str, int]:
    """CRC of each file, without RECORD, which lists the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.filename.endswith("/RECORD")}


def run(*arguments: str) -> None:
    """Run this Python; print its output only if it fails."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout}")


if __name__ == "__main__":
    main()
