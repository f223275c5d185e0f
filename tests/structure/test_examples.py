"""The examples run as they stand; each checks its own result."""

import subprocess
import sys
from pathlib import Path

import pytest

from prunekern import _native
from prunekern.nn import CompactLinear

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path):
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
@pytest.mark.parametrize("activation, weights", [("relu", "fp32"), ("silu", "int8"), ("gelu_tanh", "bf16")])
def test_numpy_runs_a_layer_saved_from_torch(activation, weights, tmp_path):
    import torch
    from safetensors.torch import save_file

    layer = CompactLinear(
        torch.randn(33, 20), torch.randn(33), range(1, 41, 2), range(33), out_features=50, activation=activation,
        weights=weights,
    )  # fmt: skip
    tensors = {k: v.float() for k, v in layer.state_dict().items()}
    tensors |= {k: v for k in ("in_index", "out_index") if (v := getattr(layer, k)) is not None}
    path = tmp_path / "layer.safetensors"
    save_file(tensors, path, {"out_features": str(layer.out_features), "activation": layer.activation})
    script = next(path for path in EXAMPLES if path.stem == "numpy_only")
    result = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "torch imported: False" in result.stdout
