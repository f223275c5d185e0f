"""Bad calls of every op and compact layer: refused with a message, or answered as the definition says; no crash."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import progress, report
from . import answers
from .tally import Tally, is_refusal

MODULE = "bench.faults.calls"
BATCH = 250
LIMIT = 120  # seconds a batch may take: longer is a hang
MEMORY = 24 << 30  # bytes of addresses, so that a huge size is an error


@dataclass
class Call:
    """function(**given). answer: what is right, by definition, of the same arguments; an error where nothing is."""

    name: str
    function: Callable[..., Any]
    given: dict[str, Any]
    answer: Callable[..., Tensor]


def _bad_tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    yield from (("None", None), ("text", "weight"), ("number", 1.5), ("list", t.tolist()), ("object", object()))
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64):
        yield str(dtype), t.to(dtype)
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    if t.dim():
        yield "one more", torch.cat([t, t[-1:]])
        yield "one less", t[:-1]
        yield "none of them", t[:0]
        yield "one dimension more", t[None]
        yield "one dimension less", t.sum(0)
        yield "last size one less", t[..., :-1]
        yield "last size 0", t[..., :0]
        yield "expanded", t[:1].expand(t.shape)
        yield "every other", torch.stack([t, t], -1)[..., 0]
        yield "overlapping", torch.as_strided(t.flatten(), t.shape, [1] * t.dim())
        yield "transposed in memory", t.T.contiguous().T if t.dim() == 2 else t.clone()
    if t.is_floating_point():
        yield "NaN", t * torch.nan
        yield "infinite", t * torch.inf
        yield "asks for gradients", t.clone().requires_grad_()
        yield "huge", t * 1e15


def _bad_indices(t: Tensor) -> Iterator[tuple[str, Any]]:
    yield from (("None", None), ("list", t.tolist()), ("text", "all"))
    yield "reversed", t.flip(0)
    yield "twice the same", torch.cat([t[:1], t[:-1]])
    yield "negative", torch.cat([t[:1] * 0 - 1, t[1:]])
    yield "out of range", torch.cat([t[:-1], t[-1:] + 10_000])
    yield "far out of range", torch.cat([t[:-1], t[-1:] * 0 + 2**62])
    yield "one more", torch.cat([t, t[-1:] + 1])
    yield "one less", t[:-1]
    yield "empty", t[:0]
    yield "2-d", t[None]
    yield "strided", torch.stack([t, t * 0 - 5], 1)[:, 0]
    yield "expanded", t[:1].expand(len(t))
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        yield str(dtype), t.to(dtype)
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()


def _bad_numbers(n: float) -> Iterator[tuple[str, Any]]:
    yield from ((str(bad), bad) for bad in (None, -1, 0, 1.5, "8", 2**31, 2**40, 2**62, 2**70, [n], float("nan")))


def _bad_texts(text: str) -> Iterator[tuple[str, Any]]:
    yield from ((repr(bad), bad) for bad in (None, "", "tanh", text.upper(), 3, b"gelu", ["gelu"]))


def _bad_lists(items: list[int]) -> Iterator[tuple[str, Any]]:
    yield from (("None", None), ("empty", []), ("text", "0"), ("number", 3), ("reversed", items[::-1]))
    yield "negative", [-1, *items[1:]]
    yield "too far", [*items[:-1], items[-1] + 1000]
    yield "far too far", [*items[:-1], 2**62]
    yield "one less", items[:-1]
    yield "fractions", [i + 0.5 for i in items]
    yield "falling", [items[0], items[-1], *items[1:]]


def _bad(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        return _bad_indices(value) if value.dtype is torch.int64 else _bad_tensors(value)
    if isinstance(value, str):
        return _bad_texts(value)
    return _bad_lists(value) if isinstance(value, list) else _bad_numbers(value)


def _spoiled(name: str, function: Callable[..., Any], given: dict[str, Any], answer: Any) -> Iterator[Call]:
    """The good call, and one for each way to spoil each argument."""
    yield Call(f"{name}: as it should be", function, given, answer)
    for argument, value in given.items():
        if value is not None:
            for how, bad in _bad(value):
                yield Call(f"{name}: {argument} {how}", function, given | {argument: bad}, answer)


def _never(**given: Any) -> Tensor:
    raise ValueError("no legal call")


def calls() -> list[Call]:
    """All of them, the same at every run."""
    from prunekern import ops
    from prunekern.nn import CompactAttention, CompactLinear, CompactMLP

    g = torch.Generator().manual_seed(0)
    rand = partial(torch.randn, generator=g)
    x, weight, bias, residual = rand(5, 12), rand(7, 9), rand(7), rand(5, 11)
    into, out = torch.tensor([0, 1, 3, 4, 5, 7, 8, 10, 11]), torch.tensor([0, 2, 3, 5, 8, 9, 10])
    base = {"x": x, "packed": weight, "bias": bias, "in_index": into, "out_index": out, "n_out": 11}
    base |= {"activation": "gelu", "residual": residual}
    found = list(_spoiled("compact_linear", ops.compact_linear, base, answers.linear))
    found += _spoiled("compact_linear, no rows", ops.compact_linear, base | {"x": x[:0], "residual": residual[:0]},
                      answers.linear)  # fmt: skip
    nothing = {"packed": weight[:0], "bias": bias[:0], "out_index": out[:0]}
    found += _spoiled("compact_linear, no outputs", ops.compact_linear, base | nothing, answers.linear)
    packed = ops.pack_weight(weight)
    for call in _spoiled("compact_linear, packed", ops.compact_linear, base | {"packed": packed}, answers.linear):
        same = call.given["packed"] is packed
        call.answer = (lambda **given: answers.linear(**given | {"packed": weight})) if same else _never
        # Panels that are longer, or read otherwise, but hold the same, are no mistake that can be seen.
        if same or not any(how in call.name for how in ("every other", "gradients", "NaN", "infin", "huge", "expanded",
                                                        "overlapping", "transposed", "should be")):  # fmt: skip
            found.append(call)
    q, scale = ops.quantize_weight(weight)
    int8 = base | {"packed": ops.pack_weight(q), "scale": scale}
    for call in _spoiled("compact_linear, int8", ops.compact_linear, int8, _never):
        argument = call.name.split(": ")[1].split()[0]
        if argument == "scale" and any(
            how in call.name for how in ("text", "None", "one ", "meta", "torch.", "sparse")
        ):
            found.append(call)
    up, down = rand(6, 9), rand(7, 6)
    mlp = {"x": x, "up": up, "down": down, "up_bias": rand(6), "down_bias": bias, "in_index": into, "out_index": out}
    mlp |= {"n_hidden": 6, "n_out": 11, "activation": "gelu", "residual": residual}
    found += _spoiled("compact_mlp", ops.compact_mlp, mlp, answers.mlp)
    attention = {
        "q": rand(2, 4, 6),
        "k": rand(2, 5, 6),
        "v": rand(2, 5, 7),
        "qk_first": [0, 2, 6],
        "v_first": [0, 4, 7],
    }
    attention |= {"key_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), "scale": 0.5}
    found += _spoiled("compact_attention", ops.compact_attention, attention, answers.attention)
    V, A, B, m = rand(7, 12), rand(3, 12), rand(7, 3), rand(7).abs()
    dora = {"V": V, "A": A, "B": B}
    # A cached norm that is not V's is a mistake that cannot be seen: it is not spoiled in its values.
    for call in _spoiled("dora_gain", ops.dora_gain, dora | {"m": m, "m_b": m.round(), "s": 2.0,
                         "v_sqnorm": ops.row_sqnorm(V)}, answers.gain):  # fmt: skip
        if call.given["V"] is V and call.given["v_sqnorm"] is not None and "v_sqnorm" not in call.name:
            found.append(Call(call.name, lambda f=call.function, **given: f(**given)[0], call.given, call.answer))
    found += _spoiled("dora_linear", ops.dora_linear, {"x": x, **dora, "gain": m, "bias": bias, "s": 2.0, "x_lora": x},
                      answers.dora)  # fmt: skip
    found += _spoiled("dora_merge", ops.dora_merge, {**dora, "gain": m, "rows": out[:4], "cols": into, "s": 2.0},
                      answers.merge)  # fmt: skip
    found += _spoiled("rms_norm", ops.rms_norm, {"x": x, "weight": rand(12), "eps": 1e-6}, answers.norm)
    layer = CompactLinear(weight, bias, into, out, 11, "gelu")
    own = {"packed": weight, "bias": bias, "in_index": into, "out_index": out, "n_out": 11, "activation": "gelu"}
    found += _spoiled("CompactLinear()", layer, {"x": x, "residual": residual}, partial(answers.linear, **own))
    made = {
        "weight": weight,
        "bias": bias,
        "in_index": into,
        "out_index": out,
        "out_features": 11,
        "activation": "gelu",
    }
    found += [
        Call(call.name, lambda **given: CompactLinear(**given)(x), call.given, _as_constructed(x))
        for call in _spoiled("CompactLinear.__init__", CompactLinear, made, None)
    ]
    first, second = CompactLinear(up, None, into, None, 6), CompactLinear(down, bias, None, out, 11)
    block = CompactMLP(first, second, activation="gelu")
    wanted = {name: mlp[name] for name in mlp if name not in ("x", "residual")} | {"up_bias": None}
    found += _spoiled("CompactMLP()", block, {"x": x, "residual": residual}, partial(answers.mlp, **wanted))
    heads = CompactAttention([0, 2, 6], [0, 4, 7], 0.5)
    layers = (CompactLinear(rand(6, 12)), CompactLinear(rand(6, 12)), CompactLinear(rand(7, 12)))

    def attend(x: Any, key_mask: Any = None) -> Tensor:
        read = [answers.linear(answers.plain(x, None, None, None), layer.weight) for layer in layers]
        return answers.attention(**attention | dict(zip("qkv", read, strict=True)) | {"key_mask": key_mask})

    given = {"x": rand(2, 5, 12), "key_mask": attention["key_mask"]}
    found += _spoiled("CompactAttention()", lambda **g: heads(layers=layers, **g), given, attend)
    return found


def _as_constructed(x: Tensor) -> Callable[..., Tensor]:
    def answer(weight: Any, out_features: Any, **given: Any) -> Tensor:
        for name in ("in_index", "out_index"):
            if isinstance(given[name], list):  # a sequence of integers is accepted there
                given[name] = torch.tensor(given[name])
        return answers.linear(x, weight, n_out=out_features, **given)

    return answer


def outcome(call: Call) -> tuple[str, str]:
    """What came of it, and what to say of it where that is bad."""
    try:
        got = call.function(**call.given)
    except Exception as error:
        if is_refusal(error):
            return "refused", ""
        return "wrong", f"{call.name}: {type(error).__name__}: {error}"
    try:
        want = call.answer(**call.given)
    except Exception as error:
        return "wrong", f"{call.name}: was accepted ({error})"
    try:
        good = answers.is_right(got, want)
    except Exception:  # a result that cannot even be compared: a sparse one
        good = False
    return ("right", "") if good else ("wrong", f"{call.name}: another answer")


def child(first: int) -> None:
    import resource

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, call in enumerate(calls()[first : first + BATCH], start=first):
        print(json.dumps([number, call.name, "began", ""]), flush=True)
        print(json.dumps([number, call.name, *outcome(call)]), flush=True)


def run() -> Tally:
    """All calls, in processes of BATCH each; the call in which one dies counts as crashed, and the next goes on."""
    tally, total, place = Tally("bad calls of ops and layers"), len(calls()), 0
    with progress.bar("bad calls") as tell:
        while place < total:
            tell(place / total)
            command = [sys.executable, "-m", MODULE, "--child", str(place)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT, timeout=LIMIT)
                text, status = done.stdout, f"status {done.returncode}"
            except subprocess.TimeoutExpired as late:
                text, status = (late.stdout or b"").decode(), "hung"
            lines = [json.loads(line) for line in text.splitlines() if line.startswith("[") and line.endswith("]")]
            if not lines:
                raise SystemExit(f"{' '.join(command)}: {status}, nothing came of it")
            for number, _, result, what in lines:
                if result != "began":
                    tally.add(result, what)
                place = number + 1
            if lines[-1][2] == "began":
                tally.add("crashed", f"{lines[-1][1]}: {status}")
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int, required=True)
    child(parser.parse_args().child)
