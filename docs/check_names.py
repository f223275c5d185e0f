"""Fails on a public name without documentation: run it after `mkdocs build`, from anywhere.

    python docs/check_names.py build/site

Every name in `__all__` of the packages below must stand in the API reference (the inventory that mkdocstrings writes,
objects.inv) and, where it is a class, a function or a module, have a docstring.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import zlib
from pathlib import Path

PACKAGES = ("prunekern", "prunekern.nn", "prunekern.ops", "prunekern.tasks")


def main(site: Path) -> int:
    """Exit status: 1 where a name is missing; what is missing goes to stderr."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    documented, faults, count = inventory(site / "objects.inv"), [], 0
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            full, value = f"{package}.{name}", getattr(module, name)
            count += 1
            if full not in documented:
                faults.append(f"{full} is not in the API reference (docs/reference/)")
            if is_documentable(value) and not (value.__doc__ or "").strip():
                faults.append(f"{full} has no docstring")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{count} public names, {len(faults)} faults")
    return 1 if faults else 0


def is_documentable(value: object) -> bool:
    """Whether a docstring can be asked for: not of a constant, which the page itself explains."""
    return inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)


def inventory(path: Path) -> set[str]:
    """Names in a Sphinx inventory: four lines of header, then compressed lines "name role priority address title"."""
    header, _, body = path.read_bytes().partition(b"zlib.\n")
    if not header.startswith(b"# Sphinx inventory version 2"):
        raise SystemExit(f"{path}: is no Sphinx inventory; build the site first")
    return {line.split(" ", 1)[0] for line in zlib.decompress(body).decode().splitlines() if line}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")))
