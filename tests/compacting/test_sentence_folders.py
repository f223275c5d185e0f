"""A compact SentenceTransformer is one: its folder, prompts, pooling, lengths and model card stay."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

import prunekern as pk
import prunekern.hf  # noqa: F401
from tests.helpers.tiny_models import prune
from tests.helpers.tiny_sentences import PROMPTS, cross_encoder, sentence_model, texts
from tests.helpers.tiny_tokenizer import word_tokenizer

CONFIG = pk.PruneConfig(rank=2, sparsity=0.3, warm_steps=0)


@pytest.fixture
def masked(tmp_path):
    model = sentence_model(tmp_path / "dense")
    prune(pk.attach(model, CONFIG), 0.3)
    return model


def test_compact_is_a_copy_around_the_compact_model(masked):
    before = {n: t.clone() for n, t in masked.state_dict().items()}
    small = pk.compact(masked)
    assert type(small) is SentenceTransformer and small is not masked and small.prompts == PROMPTS
    for ask in ({}, {"prompt_name": "query"}, {"truncate_dim": 16}, {"batch_size": 1}):
        got, want = (m.encode(texts(6), **ask) for m in (small, masked))
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-4, ask
    assert all(torch.equal(t, before[n]) for n, t in masked.state_dict().items())
    assert small.model_card_data.model is small and masked.model_card_data.model is masked
    assert small[1] is not masked[1]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_save_and_load(weights, masked, tmp_path):
    small = pk.compact(masked)
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    (folder / "3_Dense").mkdir()  # of a model that was here before
    pk.save(small, folder, weights=weights)
    assert (folder / "notes.txt").read_text() == "kept" and not (folder / "3_Dense").exists()
    assert (folder / "modules.json").is_file() and (folder / "README.md").is_file()
    want = masked.encode(texts(5), prompt_name="query")
    for again in (SentenceTransformer(str(folder), device="cpu"), pk.load(folder)):
        assert type(again) is SentenceTransformer and again.prompts == PROMPTS and again.max_seq_length == 12
        got = again.encode(texts(5), prompt_name="query")
        assert np.abs(got - want).max() < (1e-4 if weights is None else 0.05)
        assert pk.plan(again) == pk.plan(masked)
    assert pk.load(folder, weights="int8")[0].auto_model.encoder.layer[0].output.dense.weights == "int8"


def test_in_a_fresh_process(masked, tmp_path):
    """One line beside sentence-transformers' own."""
    pk.save(pk.compact(masked), tmp_path / "small")
    code = (
        "import prunekern.hf, sys\nfrom sentence_transformers import SentenceTransformer\n"
        f"print(SentenceTransformer({str(tmp_path / 'small')!r}, device='cpu').encode({texts(2)!r}).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert np.abs(np.array(eval(out.splitlines()[-1])) - masked.encode(texts(2))).max() < 1e-4


def test_long_prompts_are_cut_with_the_text(masked):
    """As in sentence-transformers: 12 words are read, prompt first."""
    small = pk.compact(masked)
    prompt = "the cat sat on a mat and saw some dogs run over hills while birds "
    got, want = (m.encode(texts(3), prompt=prompt) for m in (small, masked))
    assert np.abs(got - want).max() < 1e-4 and np.abs(got[0] - got[1]).max() < 1e-6  # nothing of the text is left


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_encode_in_few_bits(precision, masked):
    small = pk.compact(masked)
    got, want = (m.encode(texts(9), precision=precision).astype(np.int32) for m in (small, masked))
    assert got.shape == want.shape and np.mean(np.abs(got - want) <= 1) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_several_processes(loaded, masked, tmp_path):
    small = pk.compact(masked)
    if loaded:
        pk.save(small, tmp_path / "small")
        small = pk.load(tmp_path / "small")
    got = small.encode(texts(8), device=["cpu", "cpu"], chunk_size=4)
    assert np.abs(got - masked.encode(texts(8))).max() < 1e-4


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_static_embedding_is_refused():
    words = word_tokenizer().backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match=r"attach: a SentenceTransformer must not have a StaticEmbedding module"):
        pk.attach(model, CONFIG)


def test_a_router_is_refused(tmp_path):
    from sentence_transformers.base.modules import Router, Transformer

    def modules(name):
        transformer = Transformer(str(tmp_path / name))
        return [transformer, Pooling(48, pooling_mode="mean")]

    for name in ("a", "b"):
        sentence_model(tmp_path / name)
    router = Router.for_query_document(modules("a"), modules("b"))
    model = SentenceTransformer(modules=[router], device="cpu")
    with pytest.raises(
        ValueError, match=r"attach: a SentenceTransformer must not have a Router module \(got one at '0'"
    ):
        pk.attach(model, CONFIG)


def test_what_is_not_compact(masked, tmp_path):
    with pytest.raises(ValueError, match="save: model is not compact .SentenceTransformer.; call prunekern.compact"):
        pk.save(masked, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    dense = sentence_model(tmp_path / "dense")
    dense.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="theirs: no module of modules.json holds a prunekern plan"):
        pk.load(tmp_path / "theirs")
    with pytest.raises(ValueError, match="compact: .* has no masked layers|plan: .* has no masked layers"):
        pk.compact(dense)


def test_without_sentence_transformers(masked, tmp_path, monkeypatch):
    pk.save(pk.compact(masked), tmp_path / "small")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"which is not installed; pip install 'prunekern\[st\]'"):
        pk.load(tmp_path / "small")


def test_what_nobody_reads_is_left_out(masked, tmp_path):
    """Poolings do not read padding, nor what transformers' pooler gives: in what `compact` returns, and `load`."""
    pk.save(pk.compact(masked), tmp_path / "small")
    for small in (pk.compact(masked), pk.load(tmp_path / "small")):
        assert small[0].auto_model.encoder.skips_padding and small[0].auto_model.pooler.rests
        for mode in ("mean", "max", "cls", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"):
            small[1] = Pooling(48, pooling_mode=mode)
            masked[1] = Pooling(48, pooling_mode=mode)
            got, want = (m.encode(texts(9)) for m in (small, masked))
            assert np.abs(got - want).max() < 1e-4, mode


def test_a_pooler_that_is_read(tmp_path):
    """A CrossEncoder's head reads it, and so may a pipeline that says so."""
    ranker = cross_encoder(tmp_path / "ranker")
    prune(pk.attach(ranker, CONFIG), 0.3)
    pk.save(pk.compact(ranker), tmp_path / "small")
    pairs = [("the cat sat", "on a mat"), ("a dog", "songs of spring")]
    for small in (pk.compact(ranker), pk.load(tmp_path / "small")):
        assert not small[0].auto_model.bert.pooler.rests
        got, want = (m.predict(pairs, activation_fn=torch.nn.Identity()) for m in (small, ranker))
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()  # logits of a head that never trained are small
    model = sentence_model(tmp_path / "dense")
    model[0].modality_config["text"]["method_output_name"] = "pooler_output"
    prune(pk.attach(model, CONFIG), 0.3)
    assert not pk.compact(model)[0].auto_model.pooler.rests
