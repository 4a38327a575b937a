"""Fixtures that more than one folder of tests uses. What they give may be damaged by a test: each gets its own copy."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coldstill.cli.main import end_process
from tests import making

# A run in the background of a shell has Ctrl-C ignored, and so have its children: tests that press it need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The servers of the tests are on this machine, where no proxy of the environment reaches them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"


_exit_code = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the exit code for the end of the process."""
    session.config.stash[_exit_code] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End a process that has driven Ray as the command `coldstill` does, after the last word of the report."""
    if "ray" in sys.modules and _exit_code in config.stash:
        end_process(config.stash[_exit_code])


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the user's own cache."""
    before = os.environ.get("COLDSTILL_CACHE")
    os.environ["COLDSTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("COLDSTILL_CACHE")
    if before is not None:
        os.environ["COLDSTILL_CACHE"] = before


class SmallDisk:
    """A real file system of its own, so that a test can fill it."""

    def __init__(self, path: Path):
        self.path = path

    def resize(self, size: str) -> None:
        """Mount it with `size` bytes ("64k"), or give it more room."""
        mounted = os.path.ismount(self.path)
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs rights that this user lacks")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk to fill; not mounted before its first `resize`."""
    path = tmp_path / "small disk"
    path.mkdir()
    yield SmallDisk(path)
    if os.path.ismount(path):
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer."""
    return making.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def _sealed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    rng = np.random.default_rng(7)
    root = tmp_path_factory.mktemp("sealed") / "dataset"
    shards = [[making.random_row(rng, f"row-{shard}-{i}") for i in range(8)] for shard in range(3)]
    making.write_dataset(root, shards, header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder)
    return root


@pytest.fixture
def tiny_dataset(_sealed: Path, tmp_path: Path) -> Path:
    """Root of a sealed dataset: V = 64, K = 8, D = 4, 3 shards of 8 rows."""
    return Path(shutil.copytree(_sealed, tmp_path / "tiny dataset"))


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer Llama of width 32 with the tiny tokenizer."""
    return making.tiny_llama(tmp_path_factory.mktemp("student"))
