"""Distillation of models of sentence-transformers from themselves as they were: a loss module for its trainers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import families
from ..families.sentence import is_sentence_model, transformer_in
from ..pruning.original import Original
from ..pruning.pruner import Pruner


class DistilLoss(nn.Module):
    """The loss of a SentenceTransformerTrainer or CrossEncoderTrainer in which the unpruned model teaches the pruned.

        pruner = prunekern.attach(model, config)              # model: SentenceTransformer
        loss = prunekern.DistilLoss(model, pruner)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=texts, loss=loss,
            callbacks=[prunekern.PruneCallback(pruner, distil=loss)],
            optimizers=(prunekern.optimizer(pruner, args), None))

    Of embeddings e (all columns of a batch together, [n, width]) and the teacher's t, rows normalised: the mean of
    1 - <e_i, t_i>, which keeps the space in place, plus `cosines` times the mean square of e e^T - t t^T, which keeps
    what texts are to each other, times n: it is a sum over the texts that one is compared with. Of a CrossEncoder: mean
    squares of the difference of its scores' logits. Plus `hidden` times the squared difference of what each block
    gives, over the teacher's mean square, the mean over blocks: the residual keeps its width, so that each block can be
    taught by its own original.

    also: another loss of sentence-transformers for this model, for data with labels; then the sum of both, and the task
    chooses the channels. Without, texts need no labels: they are chosen by the curvature of this loss
    (`Distillation` says how). weight: of this loss beside the other.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner,
        also: nn.Module | None = None,
        weight: float = 1.0,
        cosines: float = 1.0,
        hidden: float = 1.0,
    ):
        super().__init__()
        if not is_sentence_model(model):
            raise TypeError(
                f"DistilLoss: model must be one of sentence-transformers (got {type(model).__name__}); for models of "
                "transformers, PruneCallback(distil='logits') or 'hidden'"
            )
        if transformer_in(model, "DistilLoss") is not pruner.model:
            raise ValueError("DistilLoss: pruner must be that of the model (got that of another one)")
        if not weight > 0 or not cosines >= 0 or not hidden >= 0:
            raise ValueError(
                f"DistilLoss: weight must be positive, cosines and hidden not negative (got {weight}, {cosines}, "
                f"{hidden})"
            )
        self.model, self.also = model, also
        self.weight, self.cosines, self.hidden = float(weight), float(cosines), float(hidden)
        self.pruner = pruner
        self.scores = any(c.__name__ == "CrossEncoder" for c in type(model).__mro__)
        self._original = Original(pruner)  # now: a run that is resumed loads what it has learnt later
        self.rests = False
        self._sum, self._count = 0.0, 0

    # -- what a `PruneCallback` asks -----------------------------------------------------------------------------

    def of(self, pruner: Pruner) -> DistilLoss:
        """Of a run of this pruner. ValueError for another."""
        if pruner is not self.pruner:
            raise ValueError("PruneCallback: distil must be a loss of the same pruner (got one of another)")
        return self

    def begin(self, args: Any = None) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """Nothing to undo."""

    def check_step(self) -> None:
        """Nothing to look at: this is the loss that the trainer was given."""

    def logs(self) -> dict[str, float]:
        """Its mean since the last time."""
        if not self._count:
            return {}
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        return {"distillation": round(mean, 6)}

    # -- the loss ------------------------------------------------------------------------------------------------

    def forward(self, inputs: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """inputs: what the trainer gives a loss: features of every column; of a CrossEncoder, columns of texts."""
        task: Tensor | None = None if self.also is None else self.also(inputs, labels, **kwargs)
        if task is not None and self.pruner.warm and self.training:
            self.rests = False
            return task
        columns: Any = self._preprocessed(inputs, **kwargs) if self.scores else [dict(f) for f in inputs]
        with self._listening() as theirs:
            taught = self._taught(columns)
        with self._listening() as own:
            ours = self._run(columns)
        self.rests = task is None and self.pruner.warm
        if self.rests and torch.is_grad_enabled():
            return (ours * torch.randn_like(ours)).sum(-1).mean()
        loss = self._loss(ours, taught) + self._between(own, theirs, columns)
        if torch.is_grad_enabled():
            self._sum, self._count = self._sum + float(loss.detach()), self._count + 1
        return loss if task is None else task + self.weight * loss

    def _preprocessed(self, inputs: list[list[str]], **kwargs: Any) -> list[dict[str, Any]]:
        model: Any = self.model
        features = model.preprocess(list(zip(*inputs, strict=True)), **kwargs)
        return [{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}]

    def _taught(self, columns: Iterable[dict[str, Any]]) -> Tensor:
        rest = [m for m in self.model.modules() if m.training]  # modules around the transformer: a dropout, say
        try:
            for module in rest:
                module.training = False
            with self._original():
                return self._run(columns)
        finally:
            for module in rest:
                module.training = True

    def _run(self, columns: Iterable[dict[str, Any]]) -> Tensor:
        """[texts, width] of embeddings, normalised; of a CrossEncoder logits [pairs, labels]."""
        if self.scores:
            return torch.cat([self.model(dict(f))["scores"] for f in columns]).float()
        found = torch.cat([self.model(dict(f))["sentence_embedding"] for f in columns])
        return F.normalize(found.float(), dim=-1)

    @contextmanager
    def _listening(self) -> Iterator[list[Tensor]]:
        """What every block gives meanwhile, [batch, tokens, width], in the order they run; nothing without `hidden`."""
        seen: list[Tensor] = []
        handles = []
        if self.hidden:

            def see(module: nn.Module, args: Any, output: Any) -> None:
                seen.append(output if isinstance(output, Tensor) else output[0])

            model = self.pruner.model
            blocks = getattr(families.of(model), "blocks", lambda m: ())(model)  # a class of one's own has none
            handles = [block.register_forward_hook(see) for block, _ in blocks]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _between(self, ours: list[Tensor], theirs: list[Tensor], columns: list[dict[str, Any]]) -> Tensor | float:
        """`hidden` times the mean over what blocks gave, of the tokens that the attention mask shows."""
        if not ours:
            return 0.0
        masks = [features.get("attention_mask") for features in columns]
        count = len(ours) // len(columns)  # blocks; columns run one after the other
        parts = []
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            mask = masks[i // count]
            if mask is not None and mask.shape == a.shape[:-1]:
                a, b = a[mask.bool()], b[mask.bool()]
            parts.append((a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12))
        return self.hidden * torch.stack(parts).mean()

    def _loss(self, ours: Tensor, taught: Tensor) -> Tensor:
        if self.scores:
            return (ours - taught).square().mean()
        near = 1 - (ours * taught).sum(-1).mean()
        if not self.cosines:
            return near
        return near + self.cosines * len(ours) * (ours @ ours.mT - taught @ taught.mT).square().mean()

    def get_config_dict(self) -> dict[str, Any]:
        """For model cards."""
        return {"weight": self.weight, "cosines": self.cosines, "hidden": self.hidden}
