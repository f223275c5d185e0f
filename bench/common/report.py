"""What every bench script ends with: a table on the terminal and a JSON in bench/results/; and how it is read again."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"


def table(title: str, rows: list[dict]) -> None:
    """Rows are dicts with the same keys: the columns."""
    shown = Table(title=title)
    for i, column in enumerate(rows[0]):
        shown.add_column(column.replace("_", " "), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*("" if v is None else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def machine() -> dict:
    """What the figures were measured on."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def command() -> str:
    """What was typed: `python -m bench.cpu.layers --quick`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = f"-m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return " ".join(["python", script, *sys.argv[1:]])


def read(name: str) -> dict:
    """What bench/results/NAME.json holds."""
    return read_file(RESULTS / f"{name}.json")


def write(name: str, **content) -> Path:
    """bench/results/NAME.json; the command that made it is kept inside."""
    path = RESULTS / f"{name}.json"
    write_file(path, {"command": command(), "machine": machine(), **content})
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", flush=True)
    return path


def read_runs(folder: Path) -> list[dict]:
    """What `write_file` left in a folder, one JSON a run, by name."""
    return [read_file(path) for path in sorted(folder.glob("*.json"))]


def read_file(path: Path) -> dict:
    return json.loads(path.read_text())


def write_file(path: Path, content: dict, indent: int | None = 2) -> None:
    """All of it or nothing: a run that is interrupted leaves no half a file. indent: None for one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent) + "\n")
    part.replace(path)
