"""Fails on a page that names a file, folder, module or test of the repository which is not there.

    python docs/check_paths.py

Read are README.md, CONTRIBUTING.md and the pages of docs/. A path is text in backticks that begins with a folder of the
repository, as `prunekern/ops/` does; NAME in it stands for a name to come. A test is text in backticks as
`room/test_file.py::test_name`, below tests/. Commands `python bench/x.py` and `python -m bench.x.y` are checked, too,
and the links of the two pages that lie outside docs/.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("prunekern", "csrc", "bench", "tests", "examples", "docs", ".ci", ".github")
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)`")
SCRIPT = re.compile(r"python (bench/[\w/]+\.py)")
MODULE = re.compile(r"python -m (bench(?:\.\w+)+)")
TEST = re.compile(r"`([\w/]+/test_\w+\.py)::(test_\w+)`")  # below tests/
LINK = re.compile(r"\]\(([^)#\s:]+)[)#]")
MADE = ("bench/results/gpu-",)  # by a command that nobody has run yet


def main() -> int:
    """Exit status: 1 where a path is missing; which, goes to stderr."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    faults, count = [], 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for path in named(text):
            count += 1
            if not (ROOT / path).exists():
                faults.append(f"{page.relative_to(ROOT)}: no {path}")
        for file, name in TEST.findall(text):
            count += 1
            path = ROOT / "tests" / file
            if not path.exists() or f"\ndef {name}(" not in path.read_text(encoding="utf-8"):
                faults.append(f"{page.relative_to(ROOT)}: no tests/{file}::{name}")
        if page.parent == ROOT:  # links of pages in docs/ are checked by mkdocs
            faults += [f"{page.name}: no {link}" for link in LINK.findall(text) if not (ROOT / link).exists()]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{count} paths on {len(pages)} pages, {len(faults)} faults")
    return 1 if faults else 0


def named(text: str) -> list[str]:
    """Paths that a page names, from the repository's root."""
    paths = [path for path in PATH.findall(text) if "NAME" not in path and not path.startswith(MADE)]
    paths += SCRIPT.findall(text)
    return paths + [f"{module.replace('.', '/')}.py" for module in MODULE.findall(text)]


if __name__ == "__main__":
    sys.exit(main())
