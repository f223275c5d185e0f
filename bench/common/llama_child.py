"""llama.cpp, asked by pipe: run by the Python of .venv-llama, which holds neither PyTorch nor prunekern.

A line of JSON in, one out. {"do": "quantize", "file", "to", "kind"}: a GGUF file from an F32 one. {"do": "load",
"name", "file", "threads", "tokens"}. {"do": "decode", "name", "ids", "prompt"}: seconds of the prompt and of each of
the given tokens after it; with "logits" true also the logits of the prompt's last token and all after it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

import llama_cpp as llama
import numpy as np

KINDS = {
    "BF16": llama.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
}
contexts: dict[str, tuple] = {}


def quantize(file: str, to: str, kind: str) -> dict:
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = KINDS[kind], 1
    status = llama.llama_model_quantize(file.encode(), to.encode(), ctypes.byref(options))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize of {kind} gave {status}")
    return {"bytes": os.path.getsize(to)}


def load(name: str, file: str, threads: int, tokens: int) -> dict:
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {file}")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = tokens
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    contexts[name] = (context, vocabulary)
    return {"vocabulary": vocabulary}


def decode(name: str, ids: list[int], prompt: int, logits: bool = False) -> dict:
    context, vocabulary = contexts[name]
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    seconds, rows = [], []
    for part in [ids[:prompt], *([token] for token in ids[prompt:])]:
        tokens = (llama.llama_token * len(part))(*part)
        start = time.perf_counter()
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(part))) != 0:
            raise RuntimeError("llama_decode failed")
        last = llama.llama_get_logits_ith(context, -1)  # waits for them
        seconds.append(time.perf_counter() - start)
        if logits:
            rows.append(np.ctypeslib.as_array(last, (vocabulary,)).tolist())
    return {"prompt": seconds[0], "tokens": seconds[1:], **({"logits": rows} if logits else {})}


def main() -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"quantize": quantize, "load": load, "decode": decode}[asked.pop("do")](**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=said, flush=True)


if __name__ == "__main__":
    main()
