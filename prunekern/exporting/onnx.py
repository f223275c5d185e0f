"""Compact models for other runtimes: ONNX files of plain operators, which need neither prunekern nor PyTorch.

`torch.export.export(small, ...)` needs nothing of this: its program holds ops of prunekern's (import it where the
program runs) on plain weights. For a program of PyTorch's own operators, export `prunekern.plain_twin(small)`.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..families.decoders.attention import CompactCausalAttention
from ..families.wrapped import is_transformers, unwrapped
from .plain import is_compact, plain_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_OPSET, LAST_OPSET = 18, 23  # asked for an older one, PyTorch's exporter writes 18 without a word
_INLINE = 2**31 - 2**26  # bytes of weights; protobuf ends at 2 GiB, and the graph wants some
_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the sequences are
_RESULTS = (
    "logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits", "cls_logits",
    "distillation_logits", "reconstruction", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds",
)  # fmt: skip
_POOLS = ("vit", "deit", "clip", "siglip")  # what model types begin with whose pooled output is what they are used for


@torch.no_grad()
def export_onnx(model: PreTrainedModel, path: str | os.PathLike[str], opset: int = 18, with_past: bool = False) -> None:
    """Write a compact model as an ONNX file of plain operators that ONNX Runtime and OpenVINO run, in fp32.

    Inputs, int64 [batch, length], both free: input_ids, attention_mask (1 or 0, needed), and token_type_ids where the
    model knows more than one type. Of models of images pixel_values, fp32 [images, channels, height, width], the first
    free; of CLIP and SigLIP both. Outputs, fp32: logits (start_logits and end_logits of question answering,
    logits_per_image, text_embeds and image_embeds of two towers, ...), or last_hidden_state of a model without a task
    head, and pooler_output of one of images, or of a tower, that has it. They equal the compact model's up to fp32
    rounding; of padded positions, do not read them. bf16 and int8 weights are written as the fp32 values they stand
    for.

    with_past: for causal language models, with caches. More inputs: position_ids [batch, length], and for every layer i
    past_key_values.{i}.key and .value fp32 [batch, 1, past, kept], kept heads side by side (kept is at least 1; `past`
    is 0 before the first call); attention_mask then is [batch, past + length]. More outputs: present.{i}.key and
    .value [batch, 1, past + length, kept], what the next call takes. Without it every call gives the logits of whole
    sequences.

    opset: 18 to 23; from 20 on GELU, from 23 on attention is one operator, which OpenVINO likes and ONNX Runtime does
    not (DistilBERT-base, 25 % removed, 1 x 128, one thread: 109 -> 97 ms and 97 -> 115). OpenVINO runs fp32 files in
    bf16 on machines with AMX unless INFERENCE_PRECISION_HINT is f32.

    The file appears under its name when it is whole, in place of an old one; above 2 GB its weights are in `path`.data
    beside it. `model` is left alone. Needs the extra `onnx`.

    Raises ValueError (a model that is not compact, or is not one of sequences [batch, length] or of images of one size;
    opset; with_past without a cache; rotary positions that depend on the length), FileNotFoundError or
    IsADirectoryError (path), ImportError.
    """
    path, model = Path(path), unwrapped(model, "export_onnx")
    _check(model, path, opset, with_past)
    twin = plain_twin(model)
    run = _WithPast(twin) if with_past else Whole(twin)
    inputs, axes = run.example()
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in twin.state_dict().values()}.values())
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name
        with _quiet():
            torch.onnx.export(
                run, tuple(inputs.values()), file, input_names=list(inputs), output_names=run.results(inputs),
                dynamic_shapes=(tuple(axes.values()),), opset_version=opset, dynamo=True,
                external_data=size > _INLINE, verbose=False,
            )  # fmt: skip
        for written in sorted(Path(folder).iterdir(), key=lambda each: each == file):  # weights before their graph
            with written.open("rb") as whole:
                os.fsync(whole.fileno())
            os.replace(written, path.with_name(written.name))


class Whole(nn.Module):
    """A twin as exporters like it: tensors in, tensors out."""

    def __init__(self, twin: PreTrainedModel):
        super().__init__()
        self.twin: PreTrainedModel = twin
        taken = _arguments(twin)
        self.names = ["input_ids", "attention_mask"] if "input_ids" in taken else []
        if getattr(twin.config, "type_vocab_size", 1) > 1 and "token_type_ids" in taken:
            self.names.append("token_type_ids")
        if "pixel_values" in taken:
            self.names.append("pixel_values")
        self.options = {"return_dict": True} | ({"use_cache": False} if "use_cache" in taken else {})
        self.pools = twin.config.model_type.startswith(_POOLS)

    def example(self) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
        """Inputs to trace with, and the names of their free axes."""
        config: Any = self.twin.config
        every, axes = {}, {}
        if "input_ids" in self.names:
            ids = torch.arange(3 * 7, device="cpu").view(3, 7) % getattr(config, "text_config", config).vocab_size
            every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            axes = {name: {0: "batch", 1: "length"} for name in every}
        if "pixel_values" in self.names:
            images = getattr(config, "vision_config", config)
            size = images.image_size if isinstance(images.image_size, (list, tuple)) else [images.image_size] * 2
            every["pixel_values"] = torch.zeros(2, images.num_channels, *size, dtype=torch.float32, device="cpu")
            axes["pixel_values"] = {0: "images"}
        return {n: every[n] for n in self.names}, {n: axes[n] for n in self.names}

    def results(self, inputs: dict[str, Tensor]) -> list[str]:
        """Names of what `forward` gives."""
        out = self.twin(**inputs, **self.options)
        return self._given(out)

    def _given(self, out: Mapping[str, Any]) -> list[str]:
        pooled = ["pooler_output"] if self.pools and "pooler_output" in out else []
        return [name for name in _RESULTS if name in out] or ["last_hidden_state", *pooled]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.twin(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return tuple(out[name] for name in self._given(out))


class _WithPast(nn.Module):
    """A causal language model with the tensors of its cache as inputs and outputs."""

    def __init__(self, twin: PreTrainedModel):
        super().__init__()
        self.twin: PreTrainedModel = twin
        layouts = [m.layout for m in twin.modules() if isinstance(m, CompactCausalAttention)]
        self.widths = [(max(at.key.numel(), 1), max(at.value.numel(), 1)) for at in layouts]

    def example(self) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
        """Inputs to trace with, and the names of their free axes."""
        batch, length, past = 3, 7, 5
        ids = torch.arange(batch * length, device="cpu").view(batch, length) % self.twin.config.vocab_size
        position = torch.arange(past, past + length, device="cpu").expand(batch, length).contiguous()
        free = {0: "batch", 1: "length"}
        inputs = {"input_ids": ids, "attention_mask": ids.new_ones(batch, past + length), "position_ids": position}
        axes = {"input_ids": free, "attention_mask": {0: "batch", 1: "length + past"}, "position_ids": free}
        for i, widths in enumerate(self.widths):
            for what, width in zip(("key", "value"), widths, strict=True):
                inputs[f"past_key_values.{i}.{what}"] = torch.zeros(
                    batch, 1, past, width, dtype=torch.float32, device="cpu"
                )
                axes[f"past_key_values.{i}.{what}"] = {0: "batch", 2: "past"}
        return inputs, axes

    def results(self, inputs: dict[str, Tensor]) -> list[str]:
        """Names of what `forward` gives."""
        return ["logits", *(n.replace("past_key_values", "present") for n in inputs if n.startswith("past"))]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        input_ids, attention_mask, position_ids, *past = inputs
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.twin(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, return_dict=True,
        )  # fmt: skip
        return out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


def _arguments(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _check(model: PreTrainedModel, path: Path, opset: int, with_past: bool) -> None:
    name = type(model).__name__
    if not is_compact(model):
        raise ValueError(f"export_onnx: model is not compact ({name}); call prunekern.compact(model) first")
    if not is_transformers(model):
        raise ValueError(
            f"export_onnx: model must be one of transformers (got {name}), whose inputs are known; "
            "torch.onnx.export(prunekern.plain_twin(model), ...) takes yours"
        )
    if name.endswith("MultipleChoice"):
        raise ValueError(f"export_onnx: model must take input_ids [batch, length] (got {name})")
    if "spatial_shapes" in _arguments(model):
        raise ValueError(
            f"export_onnx: model must take images of one size (got {name}, which fits its positions to each image)"
        )
    if type(opset) is not int or not LEAST_OPSET <= opset <= LAST_OPSET:
        raise ValueError(f"export_onnx: opset must be {LEAST_OPSET} to {LAST_OPSET} (got {opset!r})")
    if with_past and not name.endswith("ForCausalLM"):
        raise ValueError(f"export_onnx: with_past needs a causal language model (got {name})")
    parameters = getattr(model.config, "rope_parameters", None) or {}
    of_types = [p for p in parameters.values() if isinstance(p, dict)]  # ModernBERT's: by type of layer
    for rope in {p.get("rope_type", "default") for p in (*of_types, parameters)} - {*_ROPE}:
        raise ValueError(
            f"export_onnx: rope_type must be one of {', '.join(_ROPE)}, whose angles do not depend on how long the "
            f"sequences are (got {rope!r})"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} to")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx and onnxscript ({error}): pip install 'prunekern[onnx]'") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about every other operator; a failure still raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
