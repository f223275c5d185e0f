"""bench/cpu/decode.py: who is compared with whom, that a wrong answer stops it, and that llama.cpp gets the model."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import llama
from bench.common.report import ROOT
from bench.common.shapes import SMOLLM2
from bench.cpu import decode


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMOLLM2 | decode.TINY))).eval().requires_grad_(False)


def test_rotary_rows_come_in_pairs():
    weight = torch.arange(12.0)[:, None]  # two heads of six rows: x0 x1 x2 y0 y1 y2
    assert llama.in_pairs(weight, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_file_holds_every_weight(tiny, tmp_path):
    llama.write_gguf(tiny, tmp_path / "it.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    kept = sum(parameter.numel() for parameter in tiny.parameters())  # the head is the embeddings
    assert sum(tensor.n_elements for tensor in tensors.values()) == kept
    down = tiny.model.layers[1].mlp.down_proj.weight
    assert torch.equal(torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy()), down)


def test_compact_models_are_compared_with_the_same_kind_of_weights():
    best = {"dense": 8.0, "sliced": 6.0, "compact fp32": 4.0, "compact int8": 2.0, "llama.cpp F32": 5.0}
    best |= {"llama.cpp Q8_0": 3.0}
    rows = {row["model"]: row for row in decode.rows_of({n: 2 * s for n, s in best.items()}, best, best, {})}
    assert rows["compact int8"]["x_llama"] == 1.5 and rows["compact fp32"]["prompt_x_llama"] == 1.25
    assert rows["llama.cpp Q8_0"]["x_llama"] is None and rows["dense"]["x_llama"] is None
    assert rows["llama.cpp Q8_0"]["x_dense"] == 2.667


def test_a_peer_that_answers_for_another_model_is_refused(tiny):
    class Other:
        def logits(self, name, ids, prompt):
            return tiny(ids.flip(1)).logits[:, prompt - 1 :]

    ids = torch.randint(5, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pytest.raises(SystemExit, match=r"llama.cpp F32: wrong answer"):
        decode.check({}, Other(), {"dense": tiny}, ids, 8)


def test_a_child_that_says_what_failed_and_one_that_dies():
    def asked(code: str) -> llama.Llama:
        it = llama.Llama.__new__(llama.Llama)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        it.child = subprocess.Popen([sys.executable, "-c", f"input(); {code}"], **pipes)
        return it

    with asked("""print('{"error": "no such file"}')""") as it, pytest.raises(RuntimeError, match="no such file"):
        it.ask("load")
    with asked("raise SystemExit(3)") as it, pytest.raises(RuntimeError, match=r"died of load \(exit status 3\)"):
        it.ask("load")


def test_quick_run(tmp_path):
    command = [sys.executable, "-m", "bench.cpu.decode", "--quick", "--out", str(tmp_path / "it")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "it.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert rows["compact int8"]["dB"] > 20 and rows["compact fp32"]["token_ms"] > 0
    peers = {f"llama.cpp {kind}" for kind in llama.KINDS.values()}
    assert (peers <= set(rows)) if llama.why_not() is None else ("make llama-venv" in result["missing"])
