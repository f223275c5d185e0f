"""Run a saved compact layer with numpy and the C++ core alone: torch is never imported.

    python examples/numpy_only.py [layer.safetensors]

The file holds `weight` [kept_out, kept_in] float32 and, where the layer has them, `bias`, `in_index`, `out_index`
(int64); its metadata `out_features` and `activation`. From torch, with a `prunekern.nn.CompactLinear` called layer:

    tensors = {k: v.float() for k, v in layer.state_dict().items()}  # int8 and bf16 become fp32
    tensors |= {k: v for k in ("in_index", "out_index") if (v := getattr(layer, k)) is not None}
    save_file(tensors, "layer.safetensors", {"out_features": str(layer.out_features), "activation": layer.activation})

Without a file one with random numbers is made. The answer is checked against float64.
"""

import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from prunekern import _C


class Layer:
    """A compact linear layer, packed for the CPU at hand."""

    def __init__(self, path):
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = file.metadata()
        self.weight = np.ascontiguousarray(tensors["weight"], np.float32)
        self.bias = np.ascontiguousarray(tensors.get("bias", np.zeros(len(self.weight))), np.float32)
        # The core checks what indices hold, and trusts their length and type.
        self.in_index, self.out_index = (
            None if name not in tensors else np.ascontiguousarray(tensors[name], np.int64)
            for name in ("in_index", "out_index")
        )
        self.out_features, self.activation = int(meta["out_features"]), meta["activation"]
        n, k = self.weight.shape
        if tensors["weight"].dtype != np.float32 or self.activation not in ACTIVATIONS:
            raise ValueError(f"{path}: needs a float32 weight and one of {', '.join(ACTIVATIONS)}")
        assert self.bias.shape == (n,)
        assert self.in_index is None or self.in_index.shape == (k,)
        assert n == (self.out_features if self.out_index is None else len(self.out_index))
        self.packed = np.empty(_C.packed_bytes(n, k), np.uint8)
        _C.pack_weight(self.weight.ctypes.data, k, 1, n, k, self.packed.ctypes.data)

    def __call__(self, x, residual=None, threads=1):
        """x: float32 [rows, in] -> [rows, out_features]; residual of that shape is added."""
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((len(x), self.out_features), np.float32)
        if residual is not None:
            residual = np.ascontiguousarray(residual, np.float32)
            assert residual.shape == y.shape
        n, k = self.weight.shape
        _C.compact_linear(
            x.ctypes.data, len(x), x.shape[1], x.shape[1], self.packed.ctypes.data, n, k,
            y.ctypes.data, self.out_features, self.out_features,
            bias=address(self.bias), in_index=address(self.in_index), out_index=address(self.out_index),
            activation=self.activation, residual=address(residual), residual_stride=self.out_features, threads=threads,
        )  # fmt: skip
        return y

    def by_definition(self, x, residual):
        """The same in float64, without the core."""
        kept = x if self.in_index is None else x[:, self.in_index]
        z = kept.astype(np.float64) @ self.weight.astype(np.float64).T + self.bias
        act = ACTIVATIONS[self.activation](z)
        y = residual.astype(np.float64)
        y[:, slice(None) if self.out_index is None else self.out_index] += act
        return y


def address(array):
    """Where an array lies; 0 for none."""
    return 0 if array is None else array.ctypes.data


def gelu(z):
    """z Phi(z)."""
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


ACTIVATIONS = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": gelu,
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
}


def example_file(folder):
    """A layer of random numbers: 384 of 768 inputs and 577 of 768 outputs kept."""
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.standard_normal((577, 384), np.float32) / 20,
        "bias": rng.standard_normal(577, np.float32),
        "in_index": np.sort(rng.choice(768, 384, replace=False)),
        "out_index": np.sort(rng.choice(768, 577, replace=False)),
    }
    path = Path(folder) / "layer.safetensors"
    save_file(tensors, path, {"out_features": "768", "activation": "gelu"})
    return path


with tempfile.TemporaryDirectory() as folder:
    layer = Layer(sys.argv[1] if len(sys.argv) > 1 else example_file(folder))
rng = np.random.default_rng(1)
inputs = layer.weight.shape[1] if layer.in_index is None else int(layer.in_index.max(initial=-1)) + 1
x = rng.standard_normal((128, inputs), np.float32)
residual = rng.standard_normal((128, layer.out_features), np.float32)
y = layer(x, residual, threads=2)
error = np.abs(y - layer.by_definition(x, residual)).max()
print(f"{_C.isa()}: largest difference to float64 {error:.1e}; torch imported: {'torch' in sys.modules}")
assert error < 1e-4 and "torch" not in sys.modules
