"""Folders as tests see them: what is in them, what should not be, a changed field."""

import json
from pathlib import Path


def content(folder):
    """Every file of a folder but the model card, which says where its model came from."""
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != "README.md")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def litter(folder):
    return [p.name for p in Path(folder).iterdir() if p.name.startswith(".")]


def edit_json(file, change):
    """change is given what the file holds and changes it in place."""
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
