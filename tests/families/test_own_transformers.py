"""A transformers model of one's own, of a type that prunekern has no family for: it goes the ways of transformers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import prunekern as pk
import prunekern.hf
from prunekern import families
from prunekern.compacting.checkpoint import set_weights
from prunekern.nn import CompactLinear
from tests.helpers.equal_models import F32
from tests.helpers.own_models import Block, attached, difference, encoder_groups, prune


class OwnConfig(PretrainedConfig):
    model_type = "prunekern_test_own"

    # hidden_size is no width here: what a config of one's own calls what is not known.
    def __init__(self, width=15, heads=3, layers=2, vocab_size=37, hidden_size=10**6, **kwargs):
        self.width, self.heads, self.layers = width, heads, layers
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class OwnBase(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        shape = {"heads": config.heads, "kv_heads": config.heads, "head_dim": 5, "value_dim": 5}
        self.blocks = nn.ModuleList(Block(config.width, True, **shape) for _ in range(config.layers))
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class OwnForClassification(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = OwnBase(config)
        self.dense, self.classifier = nn.Linear(config.width, 11), nn.Linear(11, config.num_labels)
        self.post_init()

    def forward(self, input_ids, labels=None):
        logits = self.classifier(torch.relu(self.dense(self.body(input_ids).mean(1))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def groups(model):
    inside = [
        type(group)(**{f: f"body.{v}" if isinstance(v, str) else v for f, v in vars(group).items()})
        for group in encoder_groups(heads=model.config.heads)
    ]
    return [*inside, families.mlp_group("dense", "classifier")]


families.register(OwnForClassification, groups)


@pytest.fixture(scope="module")
def masked():
    torch.manual_seed(0)
    model = OwnForClassification(OwnConfig()).eval()
    families.check(model, input_ids=ids())
    prune(attached(model, sparsity=0.3), 0.4)
    return model


def ids():
    return torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def test_saved_and_loaded_as_transformers_does(masked, tmp_path):
    small = pk.compact(masked)
    assert difference(logits(small), logits(masked)) <= F32
    pk.save(small, tmp_path / "m")
    assert not (tmp_path / "m" / "prunekern.json").exists()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["heads"] == 3
    for again in (pk.load(tmp_path / "m"), OwnForClassification.from_pretrained(tmp_path / "m")):
        assert type(again) is OwnForClassification and pk.plan(again) == pk.plan(masked)
        assert torch.equal(logits(again), logits(small))
        assert sum(isinstance(m, CompactLinear) for m in again.modules()) == 14
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(pk.load(tmp_path / "again")), logits(small))


def test_few_bits(masked, tmp_path):
    small = pk.compact(masked)
    for kind in ("bf16", "int8", "int4"):
        pk.save(small, tmp_path / "m", weights=kind)
        want = logits(pk.load(tmp_path / "m"))
        # The embeddings of few-bit files are in bf16.
        twin = copy.deepcopy(small)
        twin.body.embed.weight.data = twin.body.embed.weight.data.bfloat16().float()
        assert difference(want, logits(set_weights(twin, kind))) <= F32


def test_calibrated(masked):
    for weights, chosen in (("int8", {"least_db": 20.0}), ("int8", {}), ("int4", {})):
        small = pk.compact(masked)
        found = pk.calibrate(small, [{"input_ids": ids()}], weights=weights, **chosen)
        assert [layer.name for layer in found.layers] == list(pk.plan(small).layers)
        assert difference(logits(small), logits(masked)) < 0.1
        assert {m.weights for m in small.modules() if isinstance(m, CompactLinear)} >= {weights}


def test_adapters_and_files_larger_than_memory(masked, tmp_path):
    torch.manual_seed(0)
    dense = OwnForClassification(OwnConfig()).eval()
    dense.save_pretrained(tmp_path / "base")
    twin = OwnForClassification.from_pretrained(tmp_path / "base")
    pruner = prune(attached(twin), 0.4)
    pk.save_adapter(pruner, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.endswith(".weight")]
    again = OwnForClassification.from_pretrained(tmp_path / "base")
    pk.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(twin))
    pk.compact_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(logits(pk.load(tmp_path / "out")), logits(pk.compact(twin)))


def test_the_task_head_is_what_lies_outside_the_base_model(masked):
    """But for what is in the table: `dense` and `classifier` are adapted, and frozen themselves."""
    trained = {n for n, p in masked.named_parameters() if p.requires_grad and "mask" not in n}
    assert trained == {n for n, _ in masked.named_parameters() if n.endswith((".A", ".B", ".magnitude"))}


def test_refusals(masked, tmp_path):
    small = pk.compact(masked)
    pk.save(small, tmp_path / "m")
    with pytest.raises(ValueError, match="into must be None, as config.json .* says what to make"):
        pk.load(tmp_path / "m", into=OwnForClassification(OwnConfig()))
    with pytest.raises(ValueError, match="attention heads must be the 3 of the plan's dense model .got 1"):
        OwnForClassification.from_pretrained(tmp_path / "m", heads=1)
    with pytest.raises(ValueError, match="OwnForClassification is registered .* save_stock"):
        pk.save_stock(small, tmp_path / "stock")
    with pytest.raises(ValueError, match="prunekern knows BertModel already, as 'bert'"):
        from transformers import BertModel

        families.register(BertModel, [families.mlp_group("a", "b")])
    families.unregister(OwnForClassification)
    try:
        with pytest.raises(ValueError, match=r"or one that is registered .*got \['OwnForClassification'\]"):
            pk.load(tmp_path / "m")
        with pytest.raises(ValueError, match="OwnForClassification has no family .* prunekern.families.register"):
            pk.plan(masked)
    finally:
        families.register(OwnForClassification, groups)


def test_with_the_trainer(tmp_path):
    from transformers import TrainingArguments

    torch.manual_seed(0)
    model = OwnForClassification(OwnConfig())
    data = [{"input_ids": ids()[i % 3], "labels": i % 2} for i in range(16)]
    args = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=6,
    )
    families.check(model, ids())
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.3))
    trainer = pk.PruneTrainer(args=args, pruner=pruner, train_dataset=data)
    trainer.train()
    assert pruner.finalized and pruner.shrunk and pruner.sparsity() >= 0.3
    model.eval()
    assert difference(logits(pk.compact(model)), logits(model)) <= F32
