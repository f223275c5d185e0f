"""Distillation of a pruned model from itself as it was: the teacher is the same model, masks and adapters off."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from ..pruning.original import Original
from ..pruning.pruner import Pruner
from .vocabulary import vocabulary_loss

On = Literal["logits", "hidden"]
# Arguments of a forward pass that are about its loss and its logits only.
_OF_THE_LOSS = (
    "labels", "shift_labels", "start_positions", "end_positions", "num_items_in_batch", "logits_to_keep",
    "fused_lm_head", "next_sentence_label", "sentence_order_label",
)  # fmt: skip
_LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits")  # of transformers' outputs


class Distillation:
    """Has the model as it was when training began teach the pruned one, on the batches of any Trainer.

    on: "logits": KL(teacher, pupil) at `temperature`, times its square (Hinton et al. 2015); squares of the difference
    where there is one label only (regression). Of language models over the tokens that `attention_mask` shows, with
    logits made `chunk` tokens at a time: there are never two arrays [tokens, vocabulary]. "hidden": squares of the
    difference of the last hidden states, over the mean square of the teacher's.
    weight: what it counts beside the task's loss, as soon as masks close. While all masks are on the teacher is the
    pupil, and its loss says nothing of what channels are worth: that is gathered from the task's loss alone. Without
    labels, the rates are zero meanwhile, and saliency is gathered from the curvature of the distillation loss: losses
    of labels drawn from the teacher (of random directions, for "hidden") have squares of that mean (Martens 2020).

    The loss is added to `loss` of the model's output (in TRL's SFTTrainer, to what it makes its loss of); a Trainer
    that computes another one is refused, by RuntimeError, at the first step. ValueError for what is not accepted, and
    for models with no such output.
    """

    def __init__(self, on: On = "logits", weight: float = 1.0, temperature: float = 1.0, chunk: int = 256):
        if on not in get_args(On):
            raise ValueError(f"Distillation: on must be one of {get_args(On)} (got {on!r})")
        if not weight > 0 or not temperature > 0 or chunk < 1:
            raise ValueError(
                f"Distillation: weight and temperature must be positive, chunk at least 1 (got {weight}, "
                f"{temperature}, {chunk})"
            )
        self.on, self.weight, self.temperature, self.chunk = on, float(weight), float(temperature), int(chunk)

    def of(self, pruner: Pruner) -> SelfTaught:
        """Of a run over the pruner's model, which teaches as it is now."""
        return SelfTaught(self, pruner)


class SelfTaught:
    """What a `PruneCallback` asks of distillation, through a run. `rests`: whether the step just computed had nothing
    but curvature in its loss, and is not to be taken.
    """

    def __init__(self, how: Distillation, pruner: Pruner):
        self.how, self.pruner = how, pruner
        self.rests = False
        self._original = Original(pruner)  # now: a run that is resumed loads what it has learnt later
        self._handles: list[RemovableHandle] = []
        self._teaching = False
        self._taught: dict[str, Tensor] = {}  # what the teacher said of this batch
        self._seen: dict[str, Tensor] = {}  # what the forward pass now going on has shown
        self._reached = self._added = False
        self._steps, self._scales = 1, False
        self._sum, self._count = 0.0, 0

    # -- the run -------------------------------------------------------------------------------------------------

    def begin(self, args: TrainingArguments | None = None) -> None:
        """Listen to the model. args: of the run, where there is one."""
        self.end()
        self._steps = 1 if args is None else args.gradient_accumulation_steps
        self._scales = args is not None and args.fp16
        model = self.pruner.model
        base, words = model.base_model, _words(model)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        if base is not model:
            self._handles.append(base.register_forward_hook(self._see_hidden))
        if words is not None and not _keeps_logits(model):
            self._handles.append(words.register_forward_pre_hook(self._see_words))

    def end(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check_step(self) -> None:
        """Before an optimiser step. RuntimeError where the loss that was added has got no gradient."""
        if self._added and not self._reached:
            raise RuntimeError(
                "distil: the distillation loss got no gradient: this Trainer computes its loss from other outputs than "
                "the model's `loss`; use its own way to add one (a loss module of sentence-transformers: DistilLoss)"
            )
        self._added = self._reached = False

    def logs(self) -> dict[str, float]:
        """Its mean since the last time."""
        if not self._count:
            return {}
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        return {"distillation": round(mean, 6)}

    # -- a forward pass ------------------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._taught = {}
        if self._teaching or not (model.training and torch.is_grad_enabled()):
            return None
        kwargs = _named(model, args, kwargs)
        lone = kwargs.get("labels") is None and "start_positions" not in kwargs
        if not lone and self.pruner.warm:
            return None
        quiet = {k: v for k, v in kwargs.items() if k not in _OF_THE_LOSS}
        self._teaching, self._seen = True, {}
        try:
            with self._original():
                if self.how.on == "hidden" or self._from_hidden(model):
                    base: Any = model.base_model
                    output = base(**quiet)  # the head would cost more than all the rest
                    self._taught = {self._name(model): output[0].detach()}
                else:
                    self._taught = {n: t.detach() for n, t in self._shown(model, model(**quiet)).items()}
        finally:
            self._teaching, self._seen = False, {}
        # Of all logits of a language model, one token's are enough: those of the rest are made in chunks.
        few = lone and self._from_hidden(model) and "forward" not in vars(model) and "logits_to_keep" not in kwargs
        return (), kwargs | {"logits_to_keep": 1} if few else kwargs

    def _from_hidden(self, model: nn.Module) -> bool:
        """Whether the logits are those that the output embeddings make of the last hidden states."""
        return self.how.on == "logits" and _words(model) is not None and _keeps_logits(model)

    def _name(self, model: nn.Module) -> str:
        return "words" if self._from_hidden(model) else "hidden"

    def _see_hidden(self, base: nn.Module, args: Any, output: Any) -> None:
        self._seen["hidden"] = output[0]

    def _see_words(self, words: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen["words"] = args[0]

    def _shown(self, model: nn.Module, output: Any) -> dict[str, Tensor]:
        """Of a forward pass: last hidden states, what the vocabulary's logits are made of, or logits themselves."""
        if self.how.on == "hidden" or self._from_hidden(model):
            return {self._name(model): output[0] if model.base_model is model else self._seen["hidden"]}
        if _words(model) is not None:
            return {"words": self._seen["words"]}
        found = {n: output[n] for n in _LOGITS if isinstance(output, dict) and output.get(n) is not None}
        if not found:
            raise ValueError(
                f"distil: {type(model).__name__} has no logits; use distil='hidden' (of a SentenceTransformer, the "
                "loss DistilLoss)"
            )
        return found

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._teaching or not self._taught:
            self.rests = False
            return None
        if not isinstance(output, dict):
            raise ValueError("distil: return_dict must be True: the loss is added to the output's")
        shown, taught = self._shown(model, output), self._taught
        self._seen, self._taught = {}, {}
        mask = kwargs.get("attention_mask")
        task = output.get("loss")
        self.rests = task is None and self.pruner.warm
        loss = self._curvature(model, shown, taught, mask) if self.rests else self._loss(model, shown, taught, mask)
        if not self.rests:
            self._sum, self._count = self._sum + float(loss.detach()), self._count + 1
        loss = self.how.weight * loss
        loss.register_hook(self._note)
        self._added = True
        if output.get("log_probs") is not None:  # TRL makes its loss of these; by how much it is divided is ours to say
            if self._scales:
                raise ValueError("distil: fp16 must be False with this Trainer (got True): its scale is not known here")
            carrying: Any = _Carrying
            output["log_probs"] = carrying.apply(output["log_probs"], loss, 1 / self._steps)
            return output
        if kwargs.get("num_items_in_batch") is not None:  # the task's loss is divided already; Trainer will not do it
            loss = loss / self._steps
        output["loss"] = loss if task is None else task + loss
        ordered: Any = output
        ordered.move_to_end("loss", last=False)
        return output

    def _note(self, gradient: Tensor) -> None:
        self._reached = True

    # -- losses --------------------------------------------------------------------------------------------------

    def _loss(
        self, model: nn.Module, shown: dict[str, Tensor], taught: dict[str, Tensor], mask: Tensor | None
    ) -> Tensor:
        if "hidden" in shown:
            ours, theirs = _tokens(shown["hidden"], mask).float(), _tokens(taught["hidden"], mask).float()
            return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)
        if "words" in shown:
            ours, theirs = (_tokens(x["words"], mask) for x in (shown, taught))
            return vocabulary_loss(ours, theirs, *_weight(model), self.how.temperature, self.how.chunk)
        parts = []
        for name, logits in shown.items():
            ours, theirs = _rows(name, logits, mask), _rows(name, taught[name], mask)
            if ours.shape[-1] == 1:
                parts.append((ours - theirs).square().mean())
                continue
            t = self.how.temperature
            log_p, log_t = F.log_softmax(ours / t, -1), F.log_softmax(theirs / t, -1)
            parts.append(t * t * F.kl_div(log_p, log_t, reduction="batchmean", log_target=True))
        return torch.stack(parts).mean()

    def _curvature(
        self, model: nn.Module, shown: dict[str, Tensor], taught: dict[str, Tensor], mask: Tensor | None
    ) -> Tensor:
        """A loss whose gradient squared is, in the mean over draws, the diagonal of the distillation loss's curvature
        where pupil and teacher agree.
        """
        if "hidden" in shown:
            ours = _tokens(shown["hidden"], mask).float()
            return (ours * torch.randn_like(ours)).sum(-1).mean()
        if "words" in shown:
            ours, theirs = (_tokens(x["words"], mask) for x in (shown, taught))
            return vocabulary_loss(ours, theirs, *_weight(model), self.how.temperature, self.how.chunk, draws=True)
        parts = []
        for name, logits in shown.items():
            ours, theirs = _rows(name, logits, mask), _rows(name, taught[name], mask)
            if ours.shape[-1] == 1:
                parts.append((ours * torch.randn_like(ours)).mean())
                continue
            drawn = torch.multinomial(F.softmax(theirs / self.how.temperature, -1), 1).squeeze(-1)
            parts.append(F.cross_entropy(ours / self.how.temperature, drawn))
        return torch.stack(parts).mean()


class _Carrying(torch.autograd.Function):
    """x, with the gradient of `share` times a loss beside its own: for a Trainer that computes its loss of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> Any:
        return by_x, by_x.new_full((), ctx.share, dtype=torch.float32), None


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, tokens, width] -> [those that the mask shows, width]; without a mask of that shape all."""
    if mask is None or mask.shape != x.shape[:-1]:
        return x.flatten(0, -2)
    return x[mask.to(torch.bool)]


def _rows(name: str, logits: Tensor, mask: Tensor | None) -> Tensor:
    """float [rows, labels]: of tokens those that the mask shows; answers' positions are labels of their sequence."""
    if name in ("start_logits", "end_logits"):
        return logits.float()
    return (_tokens(logits, mask) if logits.dim() > 2 else logits).float()


def _words(model: nn.Module) -> nn.Linear | None:
    """The output embeddings of a language model."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Linear) else None


def _weight(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    words = _words(model)
    assert words is not None
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("distil: on must be 'hidden' for a model with final_logit_softcapping (got 'logits')")
    return words.weight, words.bias


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the forward pass can be told to make logits of the last tokens only, from the last hidden states."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
