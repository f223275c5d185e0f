"""Who compact models are measured against in 16 and 8 bits: an encoder classifier on the CPU, run by others.

As in `peers_models`: (model, input_ids [B, T], attention_mask [B, T], threads) -> a function that gives the logits,
in fp32; the model comes in fp32 and is left alone. A peer that is not installed, or does not take the model, raises
`Missing`, which says why.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from bench.common import peers_models
from bench.common.answers import decibel
from bench.common.peers_models import Call, Logits, quiet

# Of the logits, of which there are two a text: right ones had 31 dB and more after DistilBERT's 6 layers, 18 and more
# after RoBERTa's 12; those of another model have none.
LEAST_DECIBEL = 10.0
SAMPLES = 8  # random inputs that ranges of activations are taken from; more of them change no time


class Missing(Exception):
    """Why a peer is not measured."""


def needed(package: str) -> ModuleType:
    """The package, or Missing with what installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        why = f"not installed: pip install {package} (or make peers-venv, and the Python of .venv-peers)"
        raise Missing(why if error.name == package else f"does not start: {error}") from error


# --- bf16 -----------------------------------------------------------------------------------------------------------


def eager_bf16(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """transformers as it is, weights and activations in bf16."""
    return in_fp32(peers_models.eager(copy.deepcopy(model).bfloat16(), ids, mask, threads))


def compiled_bf16(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """torch.compile with freezing."""
    return in_fp32(peers_models.compiled(copy.deepcopy(model).bfloat16(), ids, mask, threads))


def openvino_bf16(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """OpenVINO, bf16 arithmetic on an fp32 model."""
    with quiet():
        graph = peers_models.converted(model, ids, mask)
        return peers_models.openvino_call(graph, ids, mask, threads, "bf16")


def zentorch_bf16(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """AMD's extension of PyTorch as a backend of torch.compile."""
    import torch._inductor.config as inductor

    needed("zentorch")
    run = torch.compile(Logits(copy.deepcopy(model).bfloat16()), backend="zentorch", dynamic=False)
    with inductor.patch(freezing=True), torch.no_grad(), quiet():
        run(ids, mask)
        run(ids, mask)
    return in_fp32(lambda: run(ids, mask))


def in_fp32(call: Call) -> Call:
    return lambda: call().float()


# --- int8 -----------------------------------------------------------------------------------------------------------


def dynamic(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """PyTorch's `quantize_dynamic`: every nn.Linear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao's end
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return peers_models.eager(small, ids, mask, threads)


def onnx_dynamic(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """ONNX Runtime's `quantize_dynamic`, a scale a channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, ready, small = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "small"))
        peers_models.exported(model, ids, mask, plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, small, per_channel=True, weight_type=QuantType.QInt8)
        session = peers_models.onnx_session(small, threads)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_static(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """OpenVINO after NNCF's post-training quantisation: ranges of activations fixed beforehand, from random inputs."""
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randint(5, 30000, ids.shape, generator=generator) for _ in range(SAMPLES)]
    exact = model(ids, attention_mask=mask).logits
    with quiet():
        for smooth in (True, False):
            graph = static_graph(model, [(ids, mask) for ids in (ids, *inputs)], smooth)
            call = peers_models.openvino_call(graph, ids, mask, threads, "f32")
            if decibel(call(), exact) >= LEAST_DECIBEL:
                break
    return call


def static_graph(model: nn.Module, inputs: list[tuple[Tensor, Tensor]], smooth: bool = True):
    """OpenVINO's graph in 8 bits, calibrated on (ids, mask) of one shape. smooth: NNCF's default for transformers,
    which made noise (-100 dB) of random models of 64 to 256 channels, where it does well without.
    """
    nncf = needed("nncf")
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    nncf.set_log_level(logging.ERROR)
    more = {}
    if not smooth:
        off = AdvancedSmoothQuantParameters(matmul=-1)
        more["advanced_parameters"] = AdvancedQuantizationParameters(smooth_quant_alphas=off)
    graph = peers_models.converted(model, *inputs[0])
    samples = nncf.Dataset([[ids.numpy(), mask.numpy()] for ids, mask in inputs])
    with contextlib.redirect_stdout(io.StringIO()):  # bars
        return nncf.quantize(graph, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs), **more)


def ctranslate(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """CTranslate2's encoder in int8, and the classifier's head in PyTorch. Dense models only."""
    from bench.common import ctranslated

    return ctranslated.call(needed("ctranslate2"), model, ids, mask, threads)


STATIC = "OpenVINO static"
PEERS = {
    "fp32": peers_models.PEERS,
    "bf16": {
        "eager": eager_bf16,
        "torch.compile": compiled_bf16,
        "OpenVINO": openvino_bf16,
        "zentorch": zentorch_bf16,
    },
    "int8": {
        "PyTorch dynamic": dynamic,
        "ONNX Runtime dynamic": onnx_dynamic,
        STATIC: openvino_static,
        "CTranslate2": ctranslate,
    },
}
