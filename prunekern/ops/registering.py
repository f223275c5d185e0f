"""How ops enter torch.library: schema, kernel, fake and gradient in one call, the same for every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .flops import count

_LIB = torch.library.Library("prunekern", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    flops: Callable[..., int],
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    key: str = "CompositeExplicitAutograd",
) -> Callable[..., Any]:
    """The op `torch.ops.prunekern.NAME` of a schema "NAME(Tensor x, ...) -> Tensor".

    kernel: what it computes, on every device. fake: shapes and dtypes of it; none where key is
    "CompositeImplicitAutograd", whose kernel calls other ops only. backward, setup_context: its gradient, as
    `torch.library.register_autograd` takes them; where it has none, a backward that refuses. flops: see `flops.count`.
    """
    name = schema.partition("(")[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, kernel, key)
    if fake is not None:
        torch.library.register_fake(f"prunekern::{name}", fake, lib=_LIB)
    if backward is not None:
        torch.library.register_autograd(f"prunekern::{name}", backward, setup_context=setup_context, lib=_LIB)
    count(name, flops)
    op: Callable[..., Any] = getattr(torch.ops.prunekern, name).default
    return op


def implement(name: str, key: str, kernel: Callable[..., Any]) -> None:
    """Another kernel of a registered op, for one dispatch key: what autocast does with it."""
    _LIB.impl(name, kernel, key)
