"""Two processes (gloo) against one with the joined batch: the same plan, losses to rounding; resumed alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parents[1] / "helpers" / "ddp_worker.py"


def start(out, batch, stop=0, processes=1):
    out.mkdir(exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    path = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(out), str(batch), str(stop)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (one,) = start(folder / "one", 8)
    return one, start(folder / "two", 4, processes=2)


def test_both_ranks_end_alike(runs):
    _, (first, second) = runs
    assert first["world"] == second["world"] == 2
    for key in ("plan", "thresholds", "flips", "saliency", "digest"):
        assert first[key] == second[key], key


def test_equal_to_one_process_with_the_joined_batch(runs):
    one, (two, _) = runs
    assert one["world"] == 1 and one["shrunk"] and two["shrunk"]
    assert one["plan"] == two["plan"] and one["flips"] == two["flips"] and sum(one["flips"]) > 0
    np.testing.assert_allclose(one["thresholds"], two["thresholds"], rtol=1e-4, atol=1e-4)
    for a, b in zip(one["saliency"], two["saliency"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert list(one["losses"]) == [str(s) for s in range(1, 13)] == list(two["losses"])
    np.testing.assert_allclose(list(one["losses"].values()), list(two["losses"].values()), rtol=1e-4)


@pytest.mark.parametrize("stop", [5, 10])
def test_resumed_as_two_processes(runs, tmp_path, stop):
    """Stopped in stage one, and in stage two, after the channels are gone; checkpoints are two steps apart."""
    start(tmp_path / "cut", 4, stop, processes=2)
    first, second = start(tmp_path / "cut", 4, processes=2)
    whole = runs[1][0]
    assert first["digest"] == second["digest"] == whole["digest"] and first["plan"] == whole["plan"]
