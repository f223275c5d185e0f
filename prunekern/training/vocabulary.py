"""The distillation loss over a large vocabulary, its logits made a few tokens at a time, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def vocabulary_loss(
    pupil: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    chunk: int = 256,
    draws: bool = False,
) -> Tensor:
    """Mean over tokens of t^2 KL(softmax(teacher W^T / t), softmax(pupil W^T / t)), fp32.

    pupil, teacher: [tokens, width], what the output embeddings are given; weight [vocabulary, width], bias or None.
    Gradients of pupil, weight and bias; the teacher's logits are made of the same weight, taken as a constant.
    chunk: tokens whose logits are there at a time. draws: the loss of a word drawn from the teacher at every token in
    the divergence's place. Zero where there is no token.
    """
    parameters = (weight, bias if bias is not None else weight.new_zeros(0))
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        pupil, teacher, *parameters, temperature, chunk, draws
    )
    return loss


class _Chunked(torch.autograd.Function):
    """Computes the gradients beside the loss: the logits are then not needed again."""

    @staticmethod
    def forward(
        ctx: Any, pupil: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, t: float, chunk: int, draws: bool
    ) -> Tensor:
        tokens = pupil.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=pupil.device)
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        by_pupil = torch.zeros_like(pupil) if needs_x else None  # [tokens, width]
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias.numel() else None
        own_bias = bias if bias.numel() else None
        for start in range(0, tokens, chunk):
            at = slice(start, start + chunk)
            x = pupil[at]
            log_p = F.log_softmax(F.linear(x, weight, own_bias).float() / t, -1)  # [chunk, vocabulary]
            log_t = F.log_softmax(F.linear(teacher[at], weight, own_bias).float() / t, -1)
            if draws:
                drawn = torch.multinomial(log_t.exp(), 1)
                total -= log_p.gather(1, drawn).sum()
                by_logits = log_p.exp_()
                by_logits.scatter_add_(1, drawn, by_logits.new_full(drawn.shape, -1.0))
                by_logits /= t * tokens
            else:
                p_t = log_t.exp()
                total += (t * t) * (p_t * (log_t - log_p)).sum()
                by_logits = log_p.exp_().sub_(p_t).mul_(t / tokens)
            by_logits = by_logits.to(weight.dtype)
            if by_pupil is not None:
                by_pupil[at] = by_logits @ weight
            if by_weight is not None:
                by_weight += (by_logits.mT @ x).float()
            if by_bias is not None:
                by_bias += by_logits.float().sum(0)
        ctx.save_for_backward(*(g for g in (by_pupil, by_weight, by_bias) if g is not None))
        ctx.have = tuple(g is not None for g in (by_pupil, by_weight, by_bias))
        ctx.dtypes = (pupil.dtype, weight.dtype, bias.dtype)
        return total / max(1, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> Any:
        saved = list(ctx.saved_tensors)
        found = [(saved.pop(0) * by_loss).to(dtype) if have else None
                 for have, dtype in zip(ctx.have, ctx.dtypes, strict=True)]  # fmt: skip
        return found[0], None, found[1], found[2], None, None, None
