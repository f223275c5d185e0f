"""Two processes (gloo) against one with the joined batch: the same plan, losses to rounding; resumed alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parents[1] / "helpers" / "ddp_worker.py"


STOPS = (5, 10)  # in stage one, and in stage two, after the channels are gone


def start(batch, *runs, processes=1):
    """What every rank wrote of each run (folder, step to stop at or 0), made one after the other."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    path = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(batch), *(str(word) for run in runs for word in run)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [[json.loads((out / f"rank-{r}.json").read_text()) for r in range(processes)] for out, _ in runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def runs(folder):
    """(of one process, of each of two); runs of two processes that stopped lie beside them."""
    ((one,),) = start(8, (folder / "one", 0))
    two, *_ = start(4, (folder / "two", 0), *((folder / f"cut-{stop}", stop) for stop in STOPS), processes=2)
    return one, two


@pytest.fixture(scope="module")
def resumed(runs, folder):
    """The runs that stopped, ended by two new processes, by where they stopped."""
    return dict(zip(STOPS, start(4, *((folder / f"cut-{stop}", 0) for stop in STOPS), processes=2), strict=True))


@pytest.mark.slow
def test_both_ranks_end_alike(runs):
    _, (first, second) = runs
    assert first["world"] == second["world"] == 2
    for key in ("plan", "thresholds", "flips", "saliency", "digest"):
        assert first[key] == second[key], key


@pytest.mark.slow
def test_equal_to_one_process_with_the_joined_batch(runs):
    one, (two, _) = runs
    assert one["world"] == 1 and one["shrunk"] and two["shrunk"]
    assert one["plan"] == two["plan"] and one["flips"] == two["flips"] and sum(one["flips"]) > 0
    np.testing.assert_allclose(one["thresholds"], two["thresholds"], rtol=1e-4, atol=1e-4)
    for a, b in zip(one["saliency"], two["saliency"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert list(one["losses"]) == [str(s) for s in range(1, 13)] == list(two["losses"])
    np.testing.assert_allclose(list(one["losses"].values()), list(two["losses"].values()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_resumed_as_two_processes(runs, resumed, stop):
    """Checkpoints are two steps apart."""
    first, second = resumed[stop]
    whole = runs[1][0]
    assert list(first["losses"]) == [str(s) for s in range(1, 13)]
    assert len(first["thresholds"]) == 12 - stop // 2 * 2  # the steps that were left
    assert first["digest"] == second["digest"] == whole["digest"] and first["plan"] == whole["plan"]
