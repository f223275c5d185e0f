"""Files out of bigbench 1.0.0, the archive of several of our texts: 358 MB, so that what is used is unpacked once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INSIDE = "bigbench-1.0.0/bigbench/benchmark_tasks/"


def unpacked(name: str, members: Mapping[str, str]) -> Path:
    """Folder `name` of the cache with these members of the archive's tasks, {member: file name}.

    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    from .fetch import BIGBENCH, cache_dir, fetch, scratch, unpack

    folder = cache_dir() / "text" / name
    if not all((folder / file).is_file() for file in members.values()):
        with scratch(folder.parent) as part:
            unpack(fetch(BIGBENCH), {_INSIDE + member: file for member, file in members.items()}, part / "made")
            folder.mkdir(parents=True, exist_ok=True)
            for file in members.values():  # one by one: the folder may be there, and lack some
                os.replace(part / "made" / file, folder / file)
    return folder


def instructions(name: str, subtask: str) -> list[dict[str, Any]]:
    """Examples ("input", "target") of a subtask of natural instructions (Mishra et al., ACL 2022)."""
    folder = unpacked(name, {f"natural_instructions/{subtask}/task.json": "task.json"})
    examples: list[dict[str, Any]] = json.loads((folder / "task.json").read_text(encoding="utf-8"))["examples"]
    return examples
