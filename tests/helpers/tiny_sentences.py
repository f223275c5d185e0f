"""A tiny SentenceTransformer and CrossEncoder: random weights, a tokenizer of whole words."""

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from tests.helpers.tiny_models import build
from tests.helpers.tiny_tokenizer import WORDS, word_tokenizer

PROMPTS = {"query": "the cat ", "document": ""}


def texts(count=24):
    """Of two to nine words."""
    return [" ".join(WORDS[(3 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(2 + i % 8)) for i in range(count)]


def dense_folder(folder, task="base", **changes):
    """A transformers model with its tokenizer, as `save_pretrained` writes it."""
    model = build("bert", task, pad_token_id=0, max_position_embeddings=64, **changes)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def sentence_model(folder, **changes):
    """Mean pooling, unit rows, prompts, 48 wide."""
    transformer = Transformer(str(dense_folder(folder, **changes)), max_seq_length=12)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu", prompts=dict(PROMPTS))


def cross_encoder(folder, labels=1, **changes):
    """One score a pair."""
    return CrossEncoder(str(dense_folder(folder, "sequence", num_labels=labels, **changes)), device="cpu")
