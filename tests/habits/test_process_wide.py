"""Defaults of the process (device, dtype, determinism, anomaly detection, autocast) change nothing that is learned,
planned or answered.

Reported of others: `set_default_device` breaks generators and index tensors (pytorch #97234 and its like).
"""

from __future__ import annotations

import ast
import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import prunekern as pk
from tests.helpers import tiny_decoders, tiny_models

ROOT = Path(pk.__file__).parent
FACTORIES = {"zeros", "ones", "empty", "full", "rand", "randn", "arange", "tensor", "randperm", "Generator",
             "linspace", "eye", "as_tensor", "randint"}  # fmt: skip
FLOATS = FACTORIES - {"arange", "tensor", "full", "randperm", "Generator", "as_tensor", "randint"}


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomalies():
    with torch.autograd.detect_anomaly(check_nan=True):
        yield


@contextmanager
def cheap_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


WHERE = {
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomalies": anomalies,
    "cheap products": cheap_products,
}


def way_through(tiny, folder):
    """attach, train, finalize, compact, save: the plan, both models' answers, and the state that is saved."""
    model, inputs = tiny.build(*(("distilbert",) if tiny is tiny_models else ("llama",))), INPUTS[tiny]
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3, warm_steps=2, ramp_steps=2, seed=3))
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-3))
    model.train()
    for _ in range(6):
        loss = model(**inputs).logits.square().mean() + pruner.penalty()
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finalize()
    model.eval()
    small = pk.compact(model)
    with torch.no_grad():
        answers = model(**inputs).logits, small(**inputs).logits
    pk.save(small, folder)
    return pk.plan(model).to_dict(), *answers, {n: t.dtype for n, t in model.state_dict().items()}


INPUTS = {tiny_models: tiny_models.batch(), tiny_decoders: tiny_decoders.batch()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tiny", [tiny_models, tiny_decoders], ids=["encoder", "decoder"])
@pytest.mark.parametrize("where", WHERE)
def test_the_way_through(where, tiny, tmp_path, monkeypatch):
    built = tiny.build(*(("distilbert",) if tiny is tiny_models else ("llama",)))
    monkeypatch.setattr(tiny, "build", lambda *_: copy.deepcopy(built))
    want = way_through(tiny, tmp_path / "plain")
    with WHERE[where]():
        got = way_through(tiny, tmp_path / "other")
    assert got[0] == want[0], "another plan"
    for mine, usual in zip(got[1:3], want[1:3], strict=True):
        torch.testing.assert_close(mine, usual, rtol=1e-4, atol=1e-5)
    assert got[3] == want[3], "other dtypes"
    with torch.no_grad():
        loaded = pk.load(tmp_path / "other")(**INPUTS[tiny]).logits
    torch.testing.assert_close(loaded, want[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["distilbert", "llama"])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_loading_and_answering_with_another_default_dtype(kind, family, tmp_path):
    tiny = tiny_models if family == "distilbert" else tiny_decoders
    model = tiny.build(family)
    tiny_models.prune(tiny_models.attached(model), 0.3)
    pk.save(pk.compact(model), tmp_path)
    with torch.no_grad():
        want = pk.load(tmp_path, weights=kind)(**INPUTS[tiny]).logits
        with default_dtype(torch.float64):
            assert torch.equal(pk.load(tmp_path, weights=kind)(**INPUTS[tiny]).logits, want)


def test_every_tensor_says_where_it_is_made():
    """A factory without device= goes wherever the process's default points; floats without dtype= likewise."""
    missing = []
    for path in ROOT.rglob("*.py"):
        if "kernels" in path.parts:  # Triton's own language
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = node.func.value, node.func.attr
            if not isinstance(owner, ast.Name) or owner.id != "torch" or name not in FACTORIES:
                continue
            said = {keyword.arg for keyword in node.keywords}
            if "device='meta'" in ast.unparse(node):  # a shape, no numbers
                continue
            if "device" not in said or (name in FLOATS and "dtype" not in said):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not missing, "\n".join(missing)
