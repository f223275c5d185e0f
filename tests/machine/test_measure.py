"""Timing: every call runs in turn, minima come out, torch's thread count is put back."""

import time

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import prunekern as pk
from prunekern.compacting.latency import dense_twin, latency
from prunekern.machine.measure import interleaved, threads


def test_calls_alternate_and_the_fastest_counts():
    order, slow = [], iter([0.02, 0.02, 0.0] + [0.02] * 10)

    def a():
        order.append("a")
        time.sleep(next(slow))

    best = interleaved({"a": a, "b": lambda: order.append("b")}, seconds=0.0, least=4)
    assert order == ["a", "b"] * 5  # once to warm up
    assert best["a"] < 0.015


def test_threads_are_put_back():
    before = torch.get_num_threads()
    try:
        with threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError
    except KeyError:
        pass
    assert torch.get_num_threads() == before


def test_dense_twin_has_the_dense_shapes_and_runs_beside():
    config = DistilBertConfig(dim=32, n_heads=2, hidden_dim=64, n_layers=2, vocab_size=50, max_position_embeddings=16)
    model = DistilBertForSequenceClassification(config)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.5))
    pruner.finalize("uniform", "random")
    small = pk.compact(model)
    twin = dense_twin(small)
    assert {n: p.shape for n, p in twin.named_parameters()} == shapes
    times = latency({"dense": twin, "compact": small}, 1, 8, seconds=0.05)
    assert set(times) == {"dense", "compact"} and min(times.values()) > 0
