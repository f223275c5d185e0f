"""Who compact models are measured against: an encoder classifier in fp32 on the CPU, run by others.

Each peer takes (model, input_ids [B, T], attention_mask [B, T], threads) and returns a function that runs the model on
these inputs, on what the two tensors hold by then, and gives its logits. Building happens outside the timed function,
for exactly these shapes: every peer may prepare whatever it can. Options are the fastest of those tried
(DistilBERT-base, 1 x 128, one thread):

- torch.compile without freezing is no faster than eager (96 ms against 79 frozen); max-autotune picks the same MKL
  kernels for fp32, the C++ wrapper gains nothing.
- ONNX Runtime is as fast on the TorchScript export, on opset 23's Attention and after its transformer optimiser
  (98 ms all of them).
- Leaving the attention mask out of the graph gains nothing.

The peers of bf16 and int8 are in bench/common/peers_models_narrow.py.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Call = Callable[[], Tensor]


class Logits(nn.Module):
    """A model as exporters like it: two tensors in, one out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def eager(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """transformers as it is: SDPA, F.linear."""
    run = Logits(model)
    return lambda: run(ids, mask)


def compiled(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """torch.compile with freezing: weights become constants, MKL packs them once."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = 64  # every model is a variant of the same code object
    run = torch.compile(Logits(model), dynamic=False)
    # Not as options={"freezing": ...}: dynamo reads the global setting, and without it nothing is frozen.
    with inductor.patch(freezing=True), torch.no_grad():
        run(ids, mask)
        run(ids, mask)
    return lambda: run(ids, mask)


def onnx_runtime(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """ONNX Runtime, all graph optimisations; its threads sleep while others are timed."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        exported(model, ids, mask, path)
        session = onnx_session(path, threads)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def exported(model: nn.Module, ids: Tensor, mask: Tensor, path: Path) -> None:
    """An ONNX file of the model, for these shapes."""
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        Logits(model), (ids, mask), path, input_names=names, dynamo=True, external_data=False, verbose=False
    )


def onnx_session(path: Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def openvino(model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """OpenVINO, one stream, fp32 arithmetic (its default on AMX machines is bf16)."""
    with quiet():
        return openvino_call(converted(model, ids, mask), ids, mask, threads, "f32")


def converted(model: nn.Module, ids: Tensor, mask: Tensor):
    """OpenVINO's graph of the model, for these shapes."""
    import openvino as ov

    return ov.convert_model(Logits(model), example_input=(ids, mask), input=[tuple(ids.shape)] * 2)


def openvino_call(graph, ids: Tensor, mask: Tensor, threads: int, precision: str) -> Call:
    import openvino as ov

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    inputs = [ids.numpy(), mask.numpy()]
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor, int], Call]] = {
    "eager": eager,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}


class quiet:
    """Exporters warn about every operator; a failure still raises."""

    def __enter__(self):
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self.caught.__exit__(*error)
        logging.disable(self.before)
