"""CTranslate2 as a peer: an encoder classifier's dense body in its int8 layers, the small head in PyTorch."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from bench.common.peers_models import Call, quiet
from bench.common.peers_models_narrow import Missing
from bench.common.sliced import SlicedBlock


def call(ctranslate2: ModuleType, model: nn.Module, ids: Tensor, mask: Tensor, threads: int) -> Call:
    """Gives the logits of `ids`, padded on the right if at all. Missing for a sliced model."""
    body = model.base_model
    if any(isinstance(module, SlicedBlock) for module in body.modules()):
        raise Missing("takes dense models only")
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.config.save_pretrained(folder)
        path = str(Path(folder) / "converted")
        converter(ctranslate2, body, folder).convert(path, quantization="int8")
        encoder = ctranslate2.Encoder(path, device="cpu", intra_threads=threads, inter_threads=1, compute_type="int8")
    head = head_of(model)

    def run() -> Tensor:
        given = ids.to(torch.int32).numpy(), mask.sum(1).to(torch.int32).numpy()
        rows, lengths = (ctranslate2.StorageView.from_array(array) for array in given)  # no copies: `given` stays
        hidden = encoder.forward_batch(rows, lengths).last_hidden_state
        return head(torch.from_numpy(np.asarray(hidden)))

    return run


def converter(ctranslate2: ModuleType, body: nn.Module, folder: str):
    """One that is given the model and a vocabulary, and reads config.json alone from `folder`."""

    class Given(ctranslate2.converters.TransformersConverter):
        def load_model(self, model_class, path, **kwargs):
            own = copy.deepcopy(body)
            own.config.position_embedding_type = "absolute"  # asked for, and no longer written
            return own

        def load_tokenizer(self, tokenizer_class, path, **kwargs):
            names = {f"token {i}": i for i in range(body.config.vocab_size)}
            return SimpleNamespace(get_vocab=lambda: names, unk_token="token 0")

    return Given(folder)


def head_of(model: nn.Module):
    """last_hidden_state [B, T, H] -> logits, as the model's own class does it."""
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return lambda hidden: model.classifier(torch.relu(model.pre_classifier(hidden[:, 0])))
    if model.config.model_type == "roberta":
        return lambda hidden: model.classifier(hidden)
    raise Missing(f"no head is written for {type(model).__name__}")
