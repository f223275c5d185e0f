"""The table that a run of `train` ends with: what is kept of each kind of channel group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table


def kinds_table(title: str, by_kind: Mapping[str, Sequence[int]]) -> Table:
    """by_kind: (kept, of) by kind, as `Pruner.report` has it."""
    table = Table(title=title)
    for column in ("kind", "kept", "of"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, (kept, of) in by_kind.items():
        table.add_row(kind.replace("_", " / "), f"{kept:,}", f"{of:,}")
    return table
