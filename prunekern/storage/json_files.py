"""JSON files, read in one way: what is wrong with one is said with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, expected: str = "") -> dict[str, Any]:
    """A JSON object. FileNotFoundError or ValueError say what is wrong with the file.

    expected: what should be at its place ("a folder written by ..."), said where there is nothing.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file" + (f"; expected {expected}" if expected else ""))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{file}: is not valid JSON (nested too deep)") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object (got {type(content).__name__})")
    return content
