"""compact_linear: a linear layer on kept channels, with gather, scatter, bias, activation and residual in one call."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern import _native

from . import _checks

OP = "compact_linear"
# Position: the number the C++ core knows it by. Every one maps 0 to 0: a removed channel is exactly zero after it.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}
_WIDTH = _native.core().panel_width() if _native.available() else 0  # columns of a panel; 0: no C++ core
_run = _native.core().compact_linear if _WIDTH else None
# The whole eager call in one C function (csrc/eager_call.cpp); None without the core or with torch < 2.10.
_EAGER = _native.core().call if _WIDTH and _native.core().use_tensor_types(Tensor, torch.nn.Parameter) else None


def compact_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    n_out: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y = scatter(act(gather(x) W^T + bias)) + residual.

    Schema: `prunekern::compact_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? in_index, Tensor? out_index,
    int n_out, str activation, Tensor? residual) -> Tensor`.

    Args:
        x: [..., in], any strides.
        packed: the weight of the kept channels, in one of two forms: plain [N, K] (any device; float64 computes in
            float64, float32, bfloat16 and float16 in float32; differentiable), or `pack_weight` of it
            [ceil(N / w), K, w] (float32 on the CPU: the C++ kernels; inference only).
        bias: [N] or None.
        in_index: [K] int64, strictly ascending: the channels of x the weight reads. None: all of them (K = in).
        out_index: [N] int64, strictly ascending: the channels of y the weight makes. None: all (N = n_out).
        n_out: channels of y. May be left out with a plain weight and no out_index.
        activation: none, relu, gelu (erf), gelu_tanh or silu.
        residual: [..., n_out] or None; added after the activation.

    Returns y [..., n_out] in the dtype of x. Channels outside out_index are 0, or the residual's value.
    Raises ValueError (shapes, indices, devices, activation) or TypeError (dtypes), naming the argument.
    """
    if _EAGER and not _is_tracing() and not _dispatch_modes() and _functorch_level() is None and _jit_trace() is None:
        if not _grad_enabled() or not _needs_grad(x, packed, bias, residual):
            number = _NUMBER.get(activation, -1)
            y = _EAGER(x, packed, bias, in_index, out_index, n_out, number, residual, _threads())
            if y is not None:
                return y
    if n_out is None:
        if packed.dim() != 2 or out_index is not None:
            raise ValueError(f"{OP}: n_out is needed with out_index or a packed weight (got None)")
        n_out = packed.shape[0]
    if packed.dim() == 2 and _plain_eager(x):  # autograd through the reference itself, which keeps z
        _check_plain(x, packed, bias, in_index, out_index, n_out, activation, residual)
        return compact_linear_reference(x, packed, bias, in_index, out_index, n_out, activation, residual)
    return torch.ops.prunekern.compact_linear(x, packed, bias, in_index, out_index, n_out, activation, residual)


def compact_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    n_out: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch on a plain weight [N, K]; differentiable; never calls the C++ core."""
    dtype = _checks.compute_dtype(x, weight)
    z = x.to(dtype)  # [..., in]; bf16 never meets a matmul
    if in_index is not None:
        z = z.index_select(-1, in_index)  # [..., K]
    y = _activate(F.linear(z, weight.to(dtype), None if bias is None else bias.to(dtype)), activation)  # [..., N]
    if out_index is not None:
        y = y.new_zeros(*y.shape[:-1], n_out).index_copy(-1, out_index, y)  # [..., n_out]
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def pack_weight(weight: Tensor) -> Tensor:
    """Lays weight [N, K] (float32, CPU, any strides) out for this machine's kernels: [ceil(N / w), K, w] float32.

    w is 8, 16 or 32 by instruction set; the last panel is padded with zeros. The layout is not portable: save the
    plain weight. Raises RuntimeError where the C++ core is missing.
    """
    core = _native.core()
    _checks.shape("pack_weight", "weight", weight, (None, None))
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise TypeError(f"pack_weight: weight must be float32 on cpu (got {weight.dtype} on {weight.device})")
    weight = weight.detach().resolve_neg()
    n, k = weight.shape
    width = core.panel_width()
    packed = _empty_panels(-(-n // width), k, width)
    core.pack_weight(weight.data_ptr(), weight.stride(0), weight.stride(1), n, k, packed.data_ptr())
    return packed


def _empty_panels(*shape: int) -> Tensor:
    """Where it fills a huge page (2 MiB) it starts on one: the C++ core asks for such pages, see pack.cpp."""
    page = 2**21 // 4  # floats
    size = math.prod(shape)
    if size < page:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    memory = torch.empty(size + page, dtype=torch.float32, device="cpu")  # what is never touched costs nothing
    start = -(memory.data_ptr() // 4) % page
    return memory[start : start + size].view(shape)


def unpack_weight(packed: Tensor, n: int) -> Tensor:
    """The plain weight [n, K] of `pack_weight`'s panels."""
    core = _native.core()
    _check_panels("unpack_weight", packed, n, packed.shape[1] if packed.dim() == 3 else 0)
    weight = torch.empty(n, packed.shape[1], dtype=torch.float32, device="cpu")
    core.unpack_weight(packed.data_ptr(), n, packed.shape[1], weight.data_ptr())
    return weight


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if activation == "silu" else z


def _activate_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return grad * (z > 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    return torch.ops.aten.silu_backward(grad, z) if activation == "silu" else grad


def _plain_eager(x: Tensor) -> bool:
    """Whether nothing (a tracer, a subclass, a dispatch mode, functorch) wants to see the op itself."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not _dispatch_modes()
        and _functorch_level() is None
        and _jit_trace() is None
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# What an eager call asks every time, looked up once: an attribute of torch costs as much as the question. Tracing
# with fake tensors is noticed by their type, in the C++ core.
_is_tracing = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads


# --- checks -----------------------------------------------------------------------------------------------------


def _check_shapes(x, packed, n, k, bias, in_index, out_index, n_out, activation, residual) -> None:
    """All that can be told without reading an index. n, k: what the weight makes and reads."""
    if activation not in _NUMBER:
        raise ValueError(f"{OP}: activation must be one of {', '.join(ACTIVATIONS)} (got {activation!r})")
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least 1 dimension (got a scalar)")
    _checks.floating(OP, "x", x)
    for name, tensor in (("packed", packed), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{OP}: {name} must be {x.dtype} like x (got {tensor.dtype})")
    _checks.same_device(
        OP, "x", x.device, packed=packed, bias=bias, in_index=in_index, out_index=out_index, residual=residual
    )
    for name, index, length in (("in_index", in_index, k), ("out_index", out_index, n)):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{OP}: {name} must be int64 (got {index.dtype})")
        _checks.shape(OP, name, index, (length,))
    if in_index is None and x.shape[-1] != k:
        raise ValueError(f"{OP}: x must have {k} channels, the weight's inputs (got {x.shape[-1]})")
    if out_index is None and n_out != n:
        raise ValueError(f"{OP}: n_out must be {n}, the weight's outputs, without out_index (got {n_out})")
    if bias is not None:
        _checks.shape(OP, "bias", bias, (n,))
    if residual is not None:
        _checks.shape(OP, "residual", residual, (*x.shape[:-1], n_out))


def _check_plain(x, weight, bias, in_index, out_index, n_out, activation, residual) -> None:
    _checks.shape(OP, "packed", weight, (None, None))
    n, k = weight.shape
    _check_shapes(x, weight, n, k, bias, in_index, out_index, n_out, activation, residual)
    for name, index, size in (("in_index", in_index, x.shape[-1]), ("out_index", out_index, n_out)):
        if index is None:
            continue
        if index.device.type == "cpu":
            _checks.kept_index(OP, name, index, size)
        elif index.numel():  # no synchronisation: the device itself stops on a bad index
            good = (index[0] >= 0) & (index[-1] < size) & (index[1:] > index[:-1]).all()
            torch._assert_async(good, f"{OP}: {name} must be sorted and < {size}")


def _check_panels(op: str, packed: Tensor, n: int, k: int) -> None:
    core = _native.core()
    width = core.panel_width()
    if packed.dim() != 3:
        raise ValueError(f"{op}: packed must be [N, K] or pack_weight's [panels, K, w] (got {list(packed.shape)})")
    if packed.shape[2] != width:
        raise ValueError(
            f"{op}: packed has panels of {packed.shape[2]} channels, the {core.isa()} kernels read {width}: "
            "pack_weight the plain weight again on this machine"
        )
    _checks.shape(op, "packed", packed, (-(-n // width), k, width))
    if packed.dtype != torch.float32 or packed.device.type != "cpu" or not packed.is_contiguous():
        raise TypeError(
            f"{op}: packed must be contiguous float32 on cpu (got {packed.dtype} on {packed.device}, "
            f"strides {packed.stride()})"
        )


def _check_packed(x, packed, bias, in_index, out_index, n_out, activation, residual) -> None:
    n = n_out if out_index is None else out_index.numel()
    k = packed.shape[1] if packed.dim() == 3 else 0
    _check_panels(OP, packed, n, k)
    _check_shapes(x, packed, n, k, bias, in_index, out_index, n_out, activation, residual)


# --- the C++ path -----------------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """tensor [..., n] as rows: (tensor, address, row stride), copied only where no single stride describes them."""
    tensor = tensor.resolve_neg()
    if tensor.dim() == 2:
        if tensor.stride(1) != 1 or tensor.stride(0) < 0:
            tensor = tensor.contiguous()
        return tensor, tensor.data_ptr(), tensor.stride(0)
    if not tensor.is_contiguous():
        flat = tensor.reshape(-1, tensor.shape[-1])
        return _rows(flat)
    return tensor, tensor.data_ptr(), tensor.shape[-1]


def _run_packed(x, packed, bias, in_index, out_index, n_out, activation, residual) -> Tensor:
    _check_packed(x, packed, bias, in_index, out_index, n_out, activation, residual)
    y = x.new_empty((*x.shape[:-1], n_out))
    if y.numel() == 0:
        return y
    kept_x, x_address, x_stride = _rows(x)  # kept: the address is worth nothing without its tensor
    kept_residual, residual_address, residual_stride = (None, 0, 0) if residual is None else _rows(residual)
    tensors = [None if t is None else t.resolve_neg().contiguous() for t in (packed, bias, in_index, out_index)]
    packed_address, bias_address, in_address, out_address = (0 if t is None else t.data_ptr() for t in tensors)
    n = n_out if out_index is None else out_index.numel()
    _run(
        x_address, y.numel() // n_out, x_stride, x.shape[-1], packed_address, n, packed.shape[1], bias_address,
        in_address, out_address, n_out, _NUMBER[activation], residual_address, residual_stride, y.data_ptr(),
        n_out, torch.get_num_threads(),
    )  # fmt: skip
    return y


# --- registration -----------------------------------------------------------------------------------------------

_LIB = torch.library.Library("prunekern", "FRAGMENT")
_ARGS = "Tensor? bias, Tensor? in_index, Tensor? out_index, int n_out, str activation, Tensor? residual) -> Tensor"
_LIB.define(f"compact_linear(Tensor x, Tensor packed, {_ARGS}", tags=(torch.Tag.pt2_compliant_tag,))
# What compiled modules call: `packed` was made of `weight` when it lay at `address` and had `version`. A graph cannot
# guard on these, so they are compared when it runs: a weight changed since then is read itself.
_LIB.define(
    f"_compact_linear_cached(Tensor x, Tensor weight, Tensor packed, int address, int version, {_ARGS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(x, packed, bias, in_index, out_index, n_out, activation, residual) -> Tensor:
    if packed.dim() == 2:
        _check_plain(x, packed, bias, in_index, out_index, n_out, activation, residual)
        y = compact_linear_reference(x, packed, bias, in_index, out_index, n_out, activation, residual)
        return y.contiguous()
    return _run_packed(x, packed, bias, in_index, out_index, n_out, activation, residual)


def _forward_cached(x, weight, packed, address, version, *rest) -> Tensor:
    fresh = version == version_of(weight) and address == weight.data_ptr()
    return _forward(x, packed if fresh else weight, *rest)


def version_of(weight: Tensor) -> int:
    """Counts in-place changes of `weight`; -1 for tensors made under inference_mode, which do not count."""
    return -1 if weight.is_inference() else weight._version


def _fake(x, packed, bias, in_index, out_index, n_out, activation, residual) -> Tensor:
    if packed.dim() == 2:
        n, k = packed.shape
    else:
        n, k = n_out if out_index is None else out_index.numel(), packed.shape[1]
    _check_shapes(x, packed, n, k, bias, in_index, out_index, n_out, activation, residual)
    return x.new_empty((*x.shape[:-1], n_out))


def _fake_cached(x, weight, packed, address, version, *rest) -> Tensor:
    return _fake(x, weight, *rest)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, bias, in_index, out_index, _, ctx.activation, residual = inputs
    ctx.is_packed = packed.dim() == 3
    ctx.with_bias, ctx.with_residual = bias is not None, residual is not None
    if not ctx.is_packed:
        ctx.save_for_backward(x, packed, bias, in_index, out_index)


def _backward(ctx, grad):
    """grad: [..., n_out]. The activation's input is computed again instead of kept."""
    if ctx.is_packed:
        raise RuntimeError(
            f"{OP}: a packed weight is for inference and has no gradient; pass the plain weight [N, K] to train"
        )
    x, weight, bias, in_index, out_index = ctx.saved_tensors
    dtype = _checks.compute_dtype(x, weight)
    read = x.to(dtype) if in_index is None else x.to(dtype).index_select(-1, in_index)  # [..., K]
    d = grad.to(dtype)
    if out_index is not None:
        d = d.index_select(-1, out_index)  # [..., N]
    if ctx.activation != "none":
        z = F.linear(read, weight.to(dtype), None if bias is None else bias.to(dtype))
        d = _activate_backward(d, z, ctx.activation)
    rows = d.reshape(-1, d.shape[-1])
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = d @ weight.to(dtype)
        if in_index is not None:
            grad_x = torch.zeros_like(x, dtype=dtype).index_copy(-1, in_index, grad_x)
        grad_x = grad_x.to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = (rows.t() @ read.reshape(-1, read.shape[-1])).to(weight.dtype)
    if ctx.with_bias and ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None, grad if ctx.with_residual else None


_LIB.impl("compact_linear", _forward, "CompositeExplicitAutograd")
_LIB.impl("_compact_linear_cached", _forward_cached, "CompositeExplicitAutograd")
torch.library.register_fake("prunekern::compact_linear", _fake, lib=_LIB)
torch.library.register_fake("prunekern::_compact_linear_cached", _fake_cached, lib=_LIB)
torch.library.register_autograd("prunekern::compact_linear", _backward, setup_context=_setup_context, lib=_LIB)
