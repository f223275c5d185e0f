"""Checkpoints of a run: which one to go on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..storage.headers import read_header


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run: a kill while one was written leaves it out."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        state = path / TRAINER_STATE_NAME  # Trainer writes it last
        if number and state.is_file():
            try:
                json.loads(state.read_text())
                json.loads((path / "adapter_config.json").read_text())
                read_header(path / "adapter.safetensors")
            except (ValueError, OSError):
                continue
            found.append((int(number[1]), path))
    return max(found)[1] if found else None
