"""bench/gpu rehearsed on the CPU: its gates, its tables, and how a promise is judged."""

import json
import time

import pytest
import torch

from bench.gpu import everything, layers, tune
from bench.gpu.models import decoders
from bench.gpu.timing import median_seconds, peak_memory, sets_for
from bench.gpu.tune_subjects import Subject, subjects
from prunekern.kernels.launch import configs

CPU, FP32 = torch.device("cpu"), torch.float32


def test_layers_are_checked_and_timed():
    (case,) = layers.gain(CPU, 1e10, 1e11, ((24, 20),), (3,), FP32)
    row = case()
    assert row["us"] > 0 and row["x_PEFT"] == pytest.approx(row["PEFT_us"] / row["us"], rel=0.05)
    (case,) = layers.training(CPU, ((24, 20),), (3,), 16, FP32)
    row = case()
    assert row["bitwise_repeatable"] is True and row["x_LoRA"] > 0
    aligned, odd = (case() for case in layers.compact(CPU, ((24, 20),), (5,), 0.25, FP32))
    assert aligned["kept"] == "18 x 15" and odd["kept"] == "17 x 14"
    assert aligned["vendor, us"] > 0 and odd["gather, of vendor"] > 0


def test_decoders_are_checked_and_timed():
    ((prefill, decode),) = (case() for case in decoders(CPU, rehearsal=True))
    assert prefill["batch x tokens"] == "1 x 8, prefill" and decode["batch x tokens"] == "1 x 1 after 8"
    assert all(row["removed_%"] >= 24.4 and row["compact_ms"] > 0 for row in (prefill, decode))


def test_peft_layers_compute_what_ours_does():
    weight, x = torch.randn(24, 20), torch.randn(6, 20)
    ours, dora = layers.our_layer(weight, 3), layers.peft_layer(weight, 3, True)
    with torch.no_grad():
        ours.A.copy_(dora.lora_A["default"].weight)
        ours.B.copy_(dora.lora_B["default"].weight)
        ours.mask.logits.fill_(1.0)
        torch.testing.assert_close(ours.eval()(x), dora(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers.peft_norm(dora), 1 / ours.inv_norm, rtol=1e-4, atol=1e-4)


def test_a_wrong_answer_ends_the_run():
    right = torch.randn(5, 5)
    layers.close("it", right, right, 1e-6)
    for wrong in (right + 1e-3, right * float("nan")):
        with pytest.raises(SystemExit, match="it: wrong answer"):
            layers.close("it", wrong, right, 1e-6)


def test_promises_are_judged_by_their_worst_figure():
    found = {
        "gain": [{"rank": r, "of_copy_bandwidth": b, "x_PEFT": x} for r, b, x in ((16, 0.9, 9.0), (64, 0.7, 6.0))],
        "training": [{"x_LoRA": 1.05, "faster_than_DoRA": 1.6, "memory_over_LoRA_outputs": 1.0}],
    }
    rows = {r["figure"]: r for r in everything.kept(found)}
    assert rows["of_copy_bandwidth"]["worst"] == 0.7 and rows["of_copy_bandwidth"]["held"] is False
    assert rows["x_PEFT"]["held"] and rows["x_LoRA"]["held"] and rows["x_LoRA"]["asked"] == "at most 1.1"
    assert "compose_of_copy" not in rows


def test_a_case_that_fails_takes_no_other_along():
    def fails():
        layers.close("it", torch.ones(2), torch.zeros(2), 1e-6)

    first, error, *last = everything.run_cases([lambda: {"a": 1}, fails, lambda: [{"a": 2}, {"a": 3}]])
    assert first == {"a": 1} and last == [{"a": 2}, {"a": 3}]
    assert "it: wrong answer" in error["error"] and "Traceback" in error["error"]


@pytest.mark.slow
def test_a_part_is_a_process_of_its_own(tmp_path, monkeypatch):
    facts = {"copy_bytes": 1e10, "product_flops": 1e11}
    (row,), errors = everything.run_part("gain", facts, tmp_path, 300, "cpu")
    assert row["us"] > 0 and errors == []
    assert everything.run_part("passes", facts, tmp_path, 300, "cpu") == (
        [],
        ["the process ended with 1"],
    )  # needs a GPU
    assert everything.run_part("gain", facts, tmp_path, 0.01, "cpu")[1] == ["time was up after 0 s"]


def test_what_is_timed_is_what_is_checked():
    seen = []
    calls = {"a": [lambda: 1, lambda: 2], "b": [lambda: 3]}
    median_seconds(calls, CPU, 0.0, check=lambda name, first: seen.append((name, first)))
    assert seen == [("a", 1), ("b", 3)]


def test_inputs_take_turns():
    seen = []
    median_seconds({"a": [lambda i=i: seen.append(i) for i in range(3)]}, CPU, 0.0)
    assert seen[:4] == [0, 1, 2, 0] and len(seen) >= 8
    assert sets_for(10, CPU) == 2 and peak_memory(lambda: None, CPU) == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["everything.py"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "no GPU that PyTorch sees" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["everything.py", "--only", "gain,nonsense"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "'gain,nonsense'" in capsys.readouterr().err


def test_tuning_leaves_what_ships_and_refuses_a_wrong_answer():
    shipped = json.dumps(configs())
    for name, subject in subjects(small=True).items():
        rows = tune.tune(subject, CPU, FP32, time.perf_counter() + 60, 2)
        assert [r["what"] for r in rows].count("shipped") == 2 and len(rows) == 4, name
        assert all(r["error"] < 1e-5 and r["us"] > 0 for r in rows), name
    assert json.dumps(configs()) == shipped
    calls, want = subject.make(CPU, FP32)
    wrong = Subject(subject.kernel, 8, lambda *_: (calls, want + 0.1 * want.abs().mean()), subject.grid)
    assert all(r["us"] != r["us"] for r in tune.tune(wrong, CPU, FP32, time.perf_counter() + 60, 2))  # NaN
    late = tune.tune(subject, CPU, FP32, 0.0, 2)  # time is up: what ships is timed all the same
    assert [r["what"] for r in late] == ["shipped", "shipped"]


def test_tuning_knows_every_kernel_of_the_promises():
    known_subjects = subjects(small=False)
    known = configs()["sm_90"]
    for subject in known_subjects.values():
        names = {n for entry in known[subject.kernel]["16"] for n in entry} - {"up_to", "BLOCK_R"}
        assert set(subject.grid) - {"BLOCK_R"} == names, subject.kernel
    assert {s.kernel for s in known_subjects.values()} >= {
        "dora_gain",
        "dora_compose",
        "dora_backward",
        "compact_linear",
    }
