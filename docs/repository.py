"""What the site shows of the repository beside docs/: figures, plots, CONTRIBUTING.md and CHANGELOG.md.

Links in the sources are those that work in the repository (`../bench/results/growth.png`). Here the files that they
lead to become files of the site, and links lose the step out of docs/. A link to a file that is not there is a warning,
which `mkdocs build --strict` fails on.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the repository's top level
LINK = re.compile(r"(\]\()([^)#\s]+)")
log = logging.getLogger("mkdocs.hooks.repository")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top level, and every file of the repository that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            path = in_repository(page.src_uri, link[1])
            if path is None or files.get_file_from_path(path) is not None:
                continue
            if (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            else:
                log.warning("%s links to %s, which is no file of the repository", page.src_uri, path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links into the repository become links inside the site."""

    def inside(match: re.Match) -> str:
        path = in_repository(page.file.src_uri, match[2])
        if path is None and page.file.src_uri in PAGES:
            path = match[2].removeprefix("docs/") if match[2].startswith("docs/") else None
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(inside, markdown)


def in_repository(page: str, link: str) -> str | None:
    """The path, from the repository's root, of a link that leaves docs/; None for one that does not."""
    if ":" in link or page in PAGES:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path
