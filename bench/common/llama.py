"""llama.cpp as a peer of language models: GGUF files of a dense Llama, and a child process that decodes with them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.common.report import ROOT

PYTHON = ROOT / ".venv-llama" / "bin" / "python"
# How llama.cpp holds weights, by the kind of ours that is nearest.
KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def why_not() -> str | None:
    """None where llama.cpp is there."""
    return None if PYTHON.exists() else "llama.cpp is not installed: make llama-venv"


def cache_bytes(config, keys: int) -> int:
    """Of `keys` tokens, in all layers: llama.cpp's default is f16."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return 2 * 2 * width * keys * config.num_hidden_layers


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key weight as llama.cpp's rotary positions want them: [x0, y0, x1, y1 ...] of each head,
    where transformers holds [x0, x1 ..., y0, y1 ...]."""
    rows, inputs = weight.shape
    return weight.view(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs)


def write_gguf(model: nn.Module, path: Path) -> None:
    """An F32 file of a LlamaForCausalLM whose head is tied to its embeddings, without a tokenizer."""
    import gguf

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    def add(name: str, weight: Tensor) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight.detach().float().numpy()))

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in _BLOCK.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = in_pairs(weight, heads if theirs == "attn_q" else kv_heads)
            add(f"blk.{i}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A child process with one model for each of KINDS, asked by pipe. A context manager: leaving it ends the child."""

    def __init__(self, model: nn.Module, folder: Path, threads: int, tokens: int, kinds: tuple[str, ...]):
        """model: see `write_gguf`; tokens: the longest text; kinds: of ours. RuntimeError where the child fails."""
        self.child = subprocess.Popen(
            [str(PYTHON), str(Path(__file__).with_name("llama_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.bytes = {}
        wide = folder / "F32.gguf"
        write_gguf(model, wide)
        for name in (KINDS[kind] for kind in kinds):
            file = folder / f"{name}.gguf"
            if file != wide:
                self.ask("quantize", file=str(wide), to=str(file), kind=name)
            self.ask("load", name=name, file=str(file), threads=threads, tokens=tokens)
            self.bytes[name] = file.stat().st_size

    def ask(self, what: str, **more) -> dict:
        self.child.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp died of {what} (exit status {self.child.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        return answer

    def decode(self, name: str, ids: Tensor, prompt: int) -> tuple[float, list[float]]:
        """(seconds of the prompt, of each token after it) of ids [1, T]."""
        answer = self.ask("decode", name=name, ids=ids[0].tolist(), prompt=prompt)
        return answer["prompt"], answer["tokens"]

    def logits(self, name: str, ids: Tensor, prompt: int) -> Tensor:
        """Of the last token of the prompt and all after it: float64 [1, T - prompt + 1, vocabulary]."""
        answer = self.ask("decode", name=name, ids=ids[0].tolist(), prompt=prompt, logits=True)
        return torch.tensor(answer["logits"], dtype=torch.float64)[None]

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error) -> None:
        self.child.stdin.close()
        self.child.wait(10)
