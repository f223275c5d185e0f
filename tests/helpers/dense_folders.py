"""Folders of a tiny dense model with its tokenizer, as users have them."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel, PreTrainedTokenizerFast

WORDS = "good great fine nice bad awful poor sad film plot actor scene the a was is very".split()


def dense_folder(folder, labels=None, **options):
    """A DistilBERT of 32 positions and a tokenizer of WORDS; labels: with a head for so many. Returns the folder.

    options: of the tokenizer.
    """
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    options = {"model_max_length": 32} | options
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options).save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(vocabulary), dim=32, n_heads=2, hidden_dim=64, n_layers=2)
    config.max_position_embeddings = 32
    if labels is not None:
        config.num_labels = labels
    (DistilBertModel if labels is None else DistilBertForSequenceClassification)(config).save_pretrained(folder)
    return folder
