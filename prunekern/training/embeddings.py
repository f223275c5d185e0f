"""Distillation of models of sentence-transformers from themselves as they were: a loss module for its trainers."""

from __future__ import annotations

from collections.abc import Iterator
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
    1 - <e_i, t_i>, which keeps the space in place and with it what texts are to each other. Plus `cosines` times the
    mean square of e e^T - t t^T, times n (a sum over the texts that one is compared with): for a pupil that need not
    stay in the teacher's space. It is 0 unless asked for: a noisy measure of what the first term says, with which half
    of MiniLM-L6 came out worse after the same time, whatever the weight. Of a CrossEncoder: mean squares of the
    difference of its scores' logits. Plus `hidden` times the squared difference of what each block gives, over the
    teacher's mean square, the mean over blocks: the residual keeps its width, so that each block can be taught by its
    own original.

    also: another loss of sentence-transformers for this model, for data with labels; then the sum of both, and the task
    chooses the channels. Without, texts need no labels: they are chosen by the curvature of this loss
    (`Distillation` says how). weight: of this loss beside the other.

    A compact model is trained in all it has kept, under the original or under what that said once:

        small = prunekern.compact(model)
        loss = prunekern.DistilLoss(small, teacher=original)   # or no teacher, and a column "label" of its embeddings

    teacher: another model of the same class, which then teaches in the pruner's place. With neither, labels of a batch
    are what a teacher gave ([texts, width], one column of texts; of a CrossEncoder its logits): no teacher is run, and
    blocks are not compared. `also` needs one of both: its labels are its own.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner | None = None,
        also: nn.Module | None = None,
        weight: float = 1.0,
        cosines: float = 0.0,
        hidden: float = 1.0,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        if not is_sentence_model(model):
            raise TypeError(
                f"DistilLoss: model must be one of sentence-transformers (got {type(model).__name__}); for models of "
                "transformers, PruneCallback(distil='logits') or 'hidden'"
            )
        inner = transformer_in(model, "DistilLoss")
        if pruner is not None and inner is not pruner.model:
            raise ValueError("DistilLoss: pruner must be that of the model (got that of another one)")
        if teacher is not None and (pruner is not None or type(teacher) is not type(model) or teacher is model):
            raise ValueError(
                f"DistilLoss: teacher must be another {type(model).__name__}, and no pruner given (got "
                f"{type(teacher).__name__}{', the model itself' if teacher is model else ''}"
                f"{', and a pruner' if pruner is not None else ''})"
            )
        if also is not None and pruner is None and teacher is None:
            raise ValueError("DistilLoss: also needs a pruner or a teacher beside it (got neither): labels are its own")
        if not weight > 0 or not cosines >= 0 or not hidden >= 0:
            raise ValueError(
                f"DistilLoss: weight must be positive, cosines and hidden not negative (got {weight}, {cosines}, "
                f"{hidden})"
            )
        self.model, self.also = model, also
        self.weight, self.cosines, self.hidden = float(weight), float(cosines), float(hidden)
        self.pruner = pruner
        self.scores = any(c.__name__ == "CrossEncoder" for c in type(model).__mro__)
        # Now: a run that is resumed loads what it has learnt later.
        self._original = None if pruner is None else Original(pruner)
        self._teacher = (teacher,)  # in a tuple: no part of this module, whose parameters a trainer may save or move
        self._inner = inner
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
        warm = self.pruner is not None and self.pruner.warm
        if task is not None and warm and self.training:
            self.rests = False
            return task
        columns: Any = self._preprocessed(inputs, **kwargs) if self.scores else [dict(f) for f in inputs]
        taught: Tensor | None = None
        theirs: list[Tensor] = []
        if labels is None or self.pruner is not None or self._teacher[0] is not None:
            taught, theirs = self._taught(columns)
        with self._listening(self._inner if theirs else None) as own:
            ours = self._run(self.model, columns)
        if taught is None:
            taught = self._of_labels(labels, ours, columns)
        self.rests = task is None and warm
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

    def _taught(self, columns: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
        """What the teacher gives, and what each of its blocks does (`_listening`)."""
        teacher = self._teacher[0] or self.model
        inner = self._inner if teacher is self.model else transformer_in(teacher, "DistilLoss")
        if self._original is None and teacher is self.model:
            raise ValueError(
                "DistilLoss: without pruner and teacher, data must have a column 'label' of the teacher's embeddings "
                "(got none)"
            )
        device = next(self.model.parameters()).device
        if teacher is not self.model and next(teacher.parameters()).device != device:
            teacher.to(device)
        trains = [m for m in teacher.modules() if m.training]  # around the transformer, too: a dropout, say
        try:
            for module in trains:
                module.training = False
            with (
                self._original() if self._original is not None else torch.no_grad(),
                self._listening(inner if self.hidden else None) as seen,
            ):
                return self._run(teacher, columns), seen
        finally:
            for module in trains:
                module.training = True

    def _of_labels(self, labels: Tensor | None, ours: Tensor, columns: list[dict[str, Any]]) -> Tensor:
        """The teacher's answers that came with the data, as `_run` gives them."""
        assert labels is not None
        want = tuple(ours.shape)
        if self.scores and labels.dim() == 1:
            labels = labels[:, None]
        if len(columns) != 1 or tuple(labels.shape) != want or not labels.is_floating_point():
            raise ValueError(
                f"DistilLoss: labels must be what the teacher gives of one column of texts, floats of shape "
                f"{list(want)} (got {str(labels.dtype)[6:]} of {list(labels.shape)} and {len(columns)} columns); "
                "another loss for data with labels of its own goes to also="
            )
        labels = labels.to(ours)
        return labels if self.scores else F.normalize(labels, dim=-1)

    def _run(self, model: Any, columns: list[dict[str, Any]]) -> Tensor:
        """[texts, width] of embeddings, normalised; of a CrossEncoder logits [pairs, labels]."""
        if self.scores:
            return torch.cat([model(dict(f))["scores"] for f in columns]).float()
        found = torch.cat([model(dict(f))["sentence_embedding"] for f in columns])
        return F.normalize(found.float(), dim=-1)

    @staticmethod
    @contextmanager
    def _listening(model: Any) -> Iterator[list[Tensor]]:
        """What every block of it gives meanwhile, [batch, tokens, width], in the order they run; of None nothing."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])

        # A class of one's own has no blocks.
        blocks = [] if model is None else getattr(families.of(model), "blocks", lambda m: ())(model)
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
