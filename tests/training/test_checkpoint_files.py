"""What lies in a checkpoint besides the adapter, and that reading it runs nothing."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer

import prunekern as pk
from tests.helpers.tiny_models import build
from tests.helpers.tiny_tokenizer import word_tokenizer
from tests.helpers.trainer_runs import fresh


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of a run, one in each stage."""
    folder = tmp_path_factory.mktemp("run")
    fresh(folder, save_steps=4).train()
    return folder


def test_the_tokenizer_goes_where_trainer_writes_it(tmp_path):
    """transformers #12806: checkpoints without it cannot be used."""
    tokenizer = word_tokenizer()
    trainer = fresh(tmp_path, trainer_options={"processing_class": tokenizer}, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    text = "the film was good"
    for folder in (tmp_path / "checkpoint-2", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
        args = torch.load(folder / "training_args.bin", weights_only=False)
        assert args.to_dict()["learning_rate"] == 1e-2
        pk.load_adapter(build(), folder)


def test_the_collators_tokenizer_where_there_is_no_other(tmp_path):
    from transformers import DataCollatorWithPadding

    collator = DataCollatorWithPadding(word_tokenizer())
    trainer = fresh(tmp_path, trainer_options={"data_collator": collator})
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


class Touch:
    """What a pickle can do when it is read."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused(name, step, legacy, run, tmp_path):
    """transformers #43140. training_args.bin is read by nobody."""
    folder, marker = tmp_path / f"checkpoint-{step}", tmp_path / "marker"
    shutil.copytree(run / folder.name, folder)
    torch.save({"state": Touch(marker)}, folder / name, _use_new_zipfile_serialization=not legacy)
    trainer = fresh(tmp_path)
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=str(folder))
    else:
        stem = name.replace("rng_state", r"rng_state\*")
        with pytest.raises(
            ValueError, match=f"resume_from_checkpoint: .*{stem}.* must hold tensors and plain values only"
        ):
            trainer.train(resume_from_checkpoint=str(folder))
    assert not marker.exists()
    with open(folder / name, "rb"):  # and the file does what it says, where it is trusted
        torch.load(folder / name, weights_only=False)
    assert marker.exists()


def test_a_checkpoint_without_its_optimiser_is_not_resumed(tmp_path):
    """Trainer would go on with new moments, and with the learning rates of the first step."""
    fresh(tmp_path, save_only_model=True, max_steps=4).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer.pt \(written with save_only_model\?\)"):
        fresh(tmp_path).train(resume_from_checkpoint=True)
    pk.load_adapter(build(), tmp_path / "checkpoint-4")
