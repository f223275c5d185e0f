"""How many floating point operations an op takes: what `torch.utils.flop_counter.FlopCounterMode` asks.

A multiply-add counts as two; activations, norms and other work by element as none, as PyTorch counts its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"
_formulae: dict[Any, Callable[..., int]] = {}


def count(name: str, formula: Callable[..., int]) -> None:
    """`formula` takes the arguments of `prunekern::NAME`, shapes in place of tensors, and `out_shape`."""
    packet = getattr(torch.ops.prunekern, name)
    _formulae[packet] = formula
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER], {packet: formula})


def of_nothing(*args: Any, **kwargs: Any) -> int:
    """Of ops that multiply no matrices."""
    return 0


def of_product(rows: Shape, n: int, k: int) -> int:
    """[..., k] times [k, n]."""
    return 2 * math.prod(rows) * n * k


def linear_flops(
    x: Shape, packed: Shape, bias: Shape | None, in_index: Shape | None, out_index: Shape | None, n_out: int,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Of `compact_linear`."""
    n, k = n_out if out_index is None else out_index[0], x[-1] if in_index is None else in_index[0]
    return of_product(x[:-1], n, k)


def _hand_over(module: ModuleType, formulae: dict[Any, Callable[..., int]]) -> None:
    for packet, formula in formulae.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)


class _WhenImported:
    """Hands the formulae over when the counter is imported. Importing it ourselves would bring Triton along: 0.4 s of a
    start that takes 4.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of the counter: what the other finders say, and the formulae after it."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _after(spec.loader, lambda module: _hand_over(module, _formulae))
                return spec
        return None


def _after(loader: Any, then: Callable[[ModuleType], None]) -> None:
    """Have `then` called with the module that this loader has run."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        then(module)

    loader.exec_module = exec_module


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
