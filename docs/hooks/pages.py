"""Hook of MkDocs: fills the pages that are generated, and resolves links that leave `docs/`.

A page says where a part is generated with a comment: `<!-- build: configuration -->`. A page that includes a document
of the repository has `<!-- include: SECURITY.md -->`. So every page exists as a file, and a link to it works on the
repository's pages too.

A relative link to a file outside `docs/` becomes a link to the repository. If a page includes that file, it becomes a
link to the page. A picture outside `docs/` is copied into the site.

`python -m mkdocs`, not `mkdocs`, runs it: the repository must be on Python's path.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs.hooks import configuration, troubleshooting

REPOSITORY = Path(__file__).parents[2]
BUILDERS: dict[str, Callable[[], str]] = {
    "configuration": configuration.markdown,
    "troubleshooting": troubleshooting.markdown,
}
BUILD = re.compile(r"^<!-- build: (\w+) -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: ([\w./]+) -->$", re.MULTILINE)
FENCED = re.compile(r"^(`{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?\[)((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
PICTURES = {".png", ".svg"}

_included: dict[str, str] = {}
"""The page that includes a document of the repository, by the document's path."""


def on_files(files: Files, config: Any) -> Files:
    """Note which page includes which document, and add the pictures of stored results."""
    _included.clear()
    for file in files.documentation_pages():
        for document in INCLUDE.findall(file.content_string):
            _included[document] = file.src_uri
    for path in sorted((REPOSITORY / "benchmarks/results").iterdir()):
        if path.suffix in PICTURES:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page's text with generated and included parts, and with links that work in the site."""
    where = page.file.src_uri
    text = relink(BUILD.sub(lambda found: BUILDERS[found[1]](), markdown), folder="docs", page=where)
    return INCLUDE.sub(lambda found: included(found[1], page=where), text)


def included(document: str, *, page: str) -> str:
    """The text of a document of the repository, without its title, which the page has."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    body = re.sub(r"\A# [^\n]*\n", "", text)
    return relink(body, folder=posixpath.dirname(document), page=page)


def relink(text: str, *, folder: str, page: str) -> str:
    """`text` with each link outside of code blocks, relative to `folder`, rewritten for the site's `page`."""
    parts, start = [], 0
    for block in FENCED.finditer(text):
        parts += [_relinked(text[start : block.start()], folder, page), block[0]]
        start = block.end()
    return "".join([*parts, _relinked(text[start:], folder, page)])


def _relinked(text: str, folder: str, page: str) -> str:
    def in_site(found: re.Match[str]) -> str:
        mark, label, link = found.groups()
        return f"{mark}{titled(label, link, folder)}]({site_link(link, folder=folder, page=page)})"

    return LINK.sub(in_site, text)


def titled(label: str, link: str, folder: str) -> str:
    """The label of a link, or the title of its page where the label only names the file: `[cluster.md](cluster.md)`."""
    target = REPOSITORY / folder / link.partition("#")[0]
    if label.removeprefix("docs/") != target.name or target.suffix != ".md" or not target.is_file():
        return label
    title = TITLE.search(target.read_text(encoding="utf-8"))
    return title[1] if title else label


def site_link(link: str, *, folder: str, page: str) -> str:
    """Where a link of a document in `folder` leads in the site. Raises `PluginError` if its file does not exist."""
    if re.match(r"[a-z]+:", link) or link.startswith("#"):
        return link
    path, mark, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(folder, path))
    if not (REPOSITORY / target).exists():
        raise PluginError(f"{page}: the link {link} leads to no file of the repository")
    if target in _included:
        target = f"docs/{_included[target]}"
    elif target.startswith("benchmarks/results/") and Path(target).suffix in PICTURES:
        target = f"docs/results/{posixpath.basename(target)}"
    if target.startswith("docs/"):
        return posixpath.relpath(target, posixpath.dirname(f"docs/{page}")) + mark + anchor
    kind = "tree" if (REPOSITORY / target).is_dir() else "blob"
    return f"https://github.com/coldstill/coldstill/{kind}/main/{target}{mark}{anchor}"
