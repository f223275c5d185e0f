"""A compact model of sentence-transformers trained in all it has kept, under what the original said of the texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers import SentenceTransformerTrainer as Trainer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn
from transformers import set_seed

from ..families.sentence import transformer_in
from ..nn import CompactLinear
from ..storage.progress import track
from .embeddings import DistilLoss
from .progress import RichProgress
from .recipe import TrainOptions
from .sentences import TEXT, embed, run, sentence_arguments

if TYPE_CHECKING:
    from rich.console import Console

LABEL = "label"  # the column that sentence-transformers gives to a loss
_AT_ONCE = 1024  # texts embedded between two moves of the bar
_MOST = 20_000  # texts that the last map is fitted to: 50 for each of MiniLM's 384 directions
_RIDGE = 0.05


def train_kept(
    small: SentenceTransformer,
    original: SentenceTransformer,
    texts: Sequence[str],
    options: TrainOptions,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the blocks and norms of `small` in place, all their weights, until its embeddings of `texts` are those of
    `original`. Returns steps, seconds and history.

    A step costs what the compact model does: the original embeds every text once, before. OUT/taught.npy keeps that,
    [texts, width] in fp32, and OUT/checkpoints what `resume` goes on from. Word embeddings stay as they are. Where the
    model normalises its embeddings, `map_answers` ends it. Options of masks and stages are not read. ValueError for a
    model that is not compact, for fewer texts than a batch has, and for a run resumed with other options or texts.
    """
    inner = transformer_in(small, "train_kept")
    if not any(isinstance(module, CompactLinear) for module in inner.modules()):
        raise ValueError(f"train_kept: small must be compact (got a {type(small).__name__} that is not)")
    if len(texts) < options.batch_size:
        raise ValueError(f"texts must be at least {options.batch_size}, one batch (got {len(texts)})")
    set_seed(options.seed)
    lengths = [model.max_seq_length for model in (small, original)]
    known = [length for length in (*lengths, options.max_length) if length]
    try:
        for model in (small, original):  # of one text both must read as much
            model.max_seq_length = min(known, default=None)
        return _train(small, inner, original, texts, options, out, resume, console)
    finally:
        for model, length in zip((small, original), lengths, strict=True):
            model.max_seq_length = length


def _train(
    small: SentenceTransformer, inner: nn.Module, original: SentenceTransformer, texts: Sequence[str],
    options: TrainOptions, out: Path, resume: bool, console: Console | None,
) -> dict[str, Any]:  # fmt: skip
    taught = answers(original, texts, out / "taught.npy", console)
    what = {"task": "embeddings, all that is kept", "model": _digest(small)}
    small.requires_grad_(False)
    trainable(inner)
    rows = Dataset.from_dict({TEXT: list(texts), LABEL: list(taught)})
    args = sentence_arguments(options, out / "checkpoints")
    trainer = Trainer(small, args, train_dataset=rows, loss=DistilLoss(small))
    try:
        state, seconds = run(
            trainer,
            what,
            options,
            rows.select_columns(TEXT),
            resume,
            RichProgress(None, console, "all that is kept"),
        )
    finally:
        small.requires_grad_(False).eval()
    map_answers(small, texts, taught, console)
    return {
        "train_seconds": seconds,
        "steps": state.global_step,
        "history": [entry for entry in state.log_history if "loss" in entry],
    }


def trainable(inner: nn.Module) -> None:
    """Have weights and biases of compact layers and of norms ask for gradients, and nothing else."""
    inner.requires_grad_(False)
    for module in inner.modules():
        if isinstance(module, CompactLinear) or type(module).__name__.endswith("Norm"):
            module.requires_grad_(True)


def answers(original: SentenceTransformer, texts: Sequence[str], file: Path, console: Console | None) -> np.ndarray:
    """float32 unit rows [texts, width] of the original; from `file` where they are of these texts."""
    made_of = json.dumps([_digest(original), original.max_seq_length, list(texts)]).encode()
    digest = hashlib.sha256(made_of).hexdigest()
    note = file.with_suffix(".sha256")
    if file.is_file() and note.is_file() and note.read_text() == digest:
        found: np.ndarray = np.load(file)
        return found
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = [order[i : i + _AT_ONCE] for i in range(0, len(order), _AT_ONCE)]
    rows = [_plain(original, [texts[i] for i in part]) for part in track(parts, "the original's embeddings", console)]
    found = np.concatenate(rows).astype(np.float32)[np.argsort(order)]
    file.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)  # a kill between both leaves no note of other embeddings
    np.save(file, found)
    note.write_text(digest)
    return found


def _plain(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """As `embed`, of what a Trainer runs: no prompt before the texts, all of the width."""
    with model.truncate_embeddings(None):
        return embed(model, texts, prompt="")


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + flat.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def map_answers(
    small: SentenceTransformer, texts: Sequence[str], taught: np.ndarray, console: Console | None = None
) -> bool:
    """Put a linear map before the model's `Normalize`: a `Dense` of sentence-transformers, [width, width].

    Of all such maps M that which brings M e nearest to the original's embeddings t (both of length 1): least squares
    over at most `_MOST` texts, drawn towards the identity by `_RIDGE` of the mean square of a direction. Gradient
    descent of whole blocks has hardly begun on it when it ends, and no block could take it up: the last thing in one is
    a layer norm. Returns False, and does nothing, for a model whose last module is not `Normalize`: only directions
    were learnt.
    """
    *first, (name, normalize) = small._modules.items()
    if not isinstance(normalize, Normalize):
        return False
    some = np.random.default_rng(len(texts)).permutation(len(texts))[:_MOST]
    order = some[np.argsort([len(texts[i]) for i in some], kind="stable")]
    parts = [order[i : i + _AT_ONCE] for i in range(0, len(order), _AT_ONCE)]
    rows = [_plain(small, [texts[i] for i in part]) for part in track(parts, "the last map", console)]
    e, t = np.concatenate(rows), taught[order].astype(np.float64)
    width = e.shape[1]
    ridge = _RIDGE * len(e) / width * np.eye(width)
    solved = np.linalg.solve(e.T @ e + ridge, e.T @ t + ridge)  # [width, width]: e @ solved is t
    weight = torch.from_numpy(solved.T).to(small.device, next(small.parameters()).dtype)
    last = Dense(width, width, bias=False, activation_function=torch.nn.Identity(), init_weight=weight)
    # Modules are called by name, "0", "1", ... or as their owner called them; so is what `module_kwargs` says of them.
    names = (name, str(int(name) + 1)) if name.isdigit() else (f"{name}_map", name)
    small._modules.clear()
    small._modules.update(first)
    for own, module in zip(names, (last.requires_grad_(False).eval(), normalize), strict=True):
        small.add_module(own, module)
    kwargs: Any = small.module_kwargs
    if kwargs and name in kwargs:
        kwargs[names[1]] = kwargs.pop(name)
    return True
