"""The model card of a compact model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..families.wrapped import is_transformers, unwrapped
from ..nn import CompactLinear
from .head import is_tied, word_head
from .held import HEAD
from .plan import Plan
from .plan import plan as plan_of
from .stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INTRO = """Compact: channels that fine-tuning found it could do without are gone, so that its layers have shapes of
their own. It loads where prunekern is installed:"""


FILE = "README.md"
MARK = "<!-- written by prunekern; without this line it is yours, and stays -->"


def is_ours_to_write(path: Path) -> bool:
    """Whether there is no card at `path`, or one that nobody has made their own."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def model_card(model: PreTrainedModel, command: str | None = None, stored: Stored | None = None) -> str:
    """Markdown with front matter: how to load `model` (compact), what was kept of each layer, sizes, what made it.

    command: as a shell takes it; None: this process's if it is `prunekern` itself, else nothing is said of it: the
    arguments of other programs may hold secrets. stored: the kinds of weights in the files, where they are not those
    of the model. ValueError for a model without a plan.
    """
    from .. import __version__

    model = unwrapped(model, "model_card")
    plan, name = plan_of(model), type(model).__name__
    command = _own_command() if command is None else command
    total = _parameters(model)
    removed = plan.dense_params() - plan.params()
    sizes = [
        ("parameters", total, total + removed),
        ("of them in block linears", plan.params(), plan.dense_params()),
        ("multiply-adds of these a token", plan.macs(), plan.dense_macs()),
    ]
    is_own = not is_transformers(model)
    library, into = ("prunekern", f", into={name}(...)") if is_own else ("transformers", "")
    base = "" if is_own else f" from `{getattr(model.config, '_name_or_path', '') or 'unknown'}`"
    lines = ["---", f"library_name: {library}", "tags: [prunekern, pruned, dora]", "---", "", MARK, ""]
    lines += [f"# {name}, compact", ""]
    lines += [_INTRO, "", "```python", "import prunekern as pk", "", f'model = pk.load("this folder"{into})', "```", ""]
    lines += [f"Made{base} by prunekern {__version__}{f': `{command}`' if command else '.'}", ""]
    lines += ["| | compact | dense | share |", "|---|---|---|---|"]
    lines += [f"| {what} | {kept:,} | {dense:,} | {kept / max(dense, 1):.3f} |" for what, kept, dense in sizes]
    if stored is not None and stored.weights != "fp32":
        lines += ["", f"Block linears are stored in `{stored.weights}`."]
    lines += _held(model)
    lines += ["", "## What was kept", "", "| layer | rows | of | columns | of |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *_rows(plan), ""])


def _parameters(model: PreTrainedModel) -> int:
    """Numbers that the model computes with, however few bits they have; those of a tied head count once."""
    head = word_head(model)
    rounded = {id(m.weight): m for m in model.modules() if isinstance(m, CompactLinear) and m.scale is not None}
    total = 0
    for parameter in model.parameters():
        layer = rounded.get(id(parameter))
        if layer is None or layer is not head or not is_tied(model):
            total += parameter.numel() if layer is None else parameter.shape[0] * layer.kept_in
    return total


def _own_command() -> str | None:
    program = Path(sys.argv[0])
    if program.name in ("prunekern", "prunekern.exe") or program.parts[-2:] == ("prunekern", "__main__.py"):
        return shlex.join(["prunekern", *sys.argv[1:]])
    return None


def _held(model: PreTrainedModel) -> list[str]:
    if not is_transformers(model):
        return []
    from .hf import choice_of  # transformers, which a card of a model in memory has at hand

    held = choice_of(model)
    if held is None:
        return []
    layers = dict(held.layers) if held.head == held.weights else {**held.layers, HEAD: held.head}
    for name in held.float_x:
        layers[name] = layers.get(name, held.weights) + ", x not rounded"
    if HEAD in layers:
        layers["the head"] = layers.pop(HEAD)
    text = f"Calibrated for `{held.weights}` weights, at least {held.least_db:g} dB in every layer: "
    if not layers:
        return ["", f"{text}all layers reach it."]
    return ["", f"{text}these are held in more bits.", "", "| layer | held in |", "|---|---|"] + [
        f"| `{name}` | {kind} |" for name, kind in layers.items()
    ]


def _rows(plan: Plan) -> list[str]:
    return [
        f"| `{name}` | {p.rows.numel():,} | {p.out_features:,} | {p.cols.numel():,} | {p.in_features:,} |"
        for name, p in plan.layers.items()
    ]
