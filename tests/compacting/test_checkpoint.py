"""Compact models on disk: exact in a fresh process, whole after a full disk or a kill."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prunekern as pk
from prunekern.storage import folders
from tests.helpers.compact_folders import python, small_model
from tests.helpers.on_disk import content, litter
from tests.helpers.tiny_models import FAMILIES, HIDDEN, TASKS, attached, batch, build, difference, logits, names

# -- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, task, share, tmp_path):
    small = small_model(family, task, share)
    pk.save(small, tmp_path / "m")
    back = pk.load(tmp_path / "m")
    assert type(back) is type(small) and not back.training
    want, got = small.state_dict(), back.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(got[n], t) for n, t in want.items())
    own = dict(small.named_buffers())
    for name, buffer in back.named_buffers():
        if name.endswith("_index"):
            assert torch.equal(buffer, own[name]), name
    assert torch.equal(logits(back, batch(8)), logits(small, batch(8)))
    assert pk.plan(back) == pk.plan(small)
    assert not any(p.requires_grad for p in back.parameters())


def test_fresh_process_computes_the_same(tmp_path):
    for family in FAMILIES:
        small = small_model(family)
        pk.save(small, tmp_path / family)
        torch.save(logits(small, batch(8)), tmp_path / f"{family}.pt")
    python(
        """
        import torch, prunekern as pk
        torch.set_num_threads(1)
        for family in ("distilbert", "bert", "roberta"):
            small = pk.load(f"{sys.argv[1]}/{family}")
            from tests.helpers.tiny_models import batch, logits
            assert torch.equal(logits(small, batch(8)), torch.load(f"{sys.argv[1]}/{family}.pt")), family
        """,
        tmp_path,
    )


def test_save_load_save_load_is_bitwise(tmp_path):
    for family in FAMILIES:
        pk.save(small_model(family, "masked_lm"), tmp_path / "a")
        pk.save(pk.load(tmp_path / "a"), tmp_path / "b")
        pk.save(pk.load(tmp_path / "b"), tmp_path / "c")
        assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_ordinary_layout_and_no_pickle(saved):
    files = set(content(saved))
    assert files == {"config.json", "model.safetensors"}
    assert (saved / "config.json").stat().st_mode & 0o444 == 0o444 and saved.stat().st_mode & 0o777 == 0o755
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    section = config["quantization_config"]
    assert section["quant_method"] == "prunekern" and section["format"] == 1 and section["plan"]["layers"]
    tensors = load_file(saved / "model.safetensors")
    n = names("distilbert")["up"]
    plan = pk.Plan.from_dict(section["plan"])
    assert tensors[f"{n}.weight"].shape == (len(plan.layers[n].rows), HIDDEN)  # plain, not packed
    assert not [t for t in tensors if "packed" in t or "index" in t]


def test_file_shrinks_as_the_parameters_do(tmp_path):
    sizes, counts = [], []
    for share in (0.0, 0.5, 0.9):
        small = small_model(share=share)
        pk.save(small, tmp_path / str(share))
        sizes.append((tmp_path / str(share) / "model.safetensors").stat().st_size)
        counts.append(sum(p.numel() for p in small.parameters()))
    header = 16_000  # names and shapes
    for size, count in zip(sizes, counts, strict=True):
        assert 4 * count < size < 4 * count + header
    assert counts[0] > 1.5 * counts[1] > 2 * counts[2]


def test_dtypes_on_disk_and_load(tmp_path):
    small = small_model(dtype=torch.float64)
    pk.save(small, tmp_path / "m")
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.float64}
    back = pk.load(tmp_path / "m", weights="fp32")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert difference(logits(back, batch()), logits(small, batch())) <= 1e-5
    with pytest.raises(ValueError, match=r"load: weights must be one of \('fp32',.*\(got 'fp8'\)"):
        pk.load(tmp_path / "m", weights="fp8")


def test_shards(tmp_path):
    small = small_model()
    pk.save(small, tmp_path / "m", max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(pk.load(tmp_path / "m"), batch()), logits(small, batch()))
    pk.save(small, tmp_path / "m")  # in one file again: no old shard stays
    assert set(content(tmp_path / "m")) == {"config.json", "model.safetensors"}
    pk.save(small, tmp_path / "m", max_shard_size="20KB")
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises((ValueError, OSError), match=shards[1]):
        pk.load(tmp_path / "m")


def test_other_files_in_the_folder_survive(saved):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "model_card.md").write_text("card")
    (saved / "modeling_notes.txt").write_text("notes")
    (saved / "onnx").mkdir()
    (saved / "onnx" / "model.onnx").write_bytes(b"x")
    (saved / "link").symlink_to("tokenizer.json")
    (saved / "pytorch_model.bin").write_bytes(b"stale")  # another form of the weights: must not be left beside ours
    pk.save(small_model(share=0.8), saved)
    own = set(content(saved))
    assert own == {"config.json", "model.safetensors", *("tokenizer.json", "model_card.md", "modeling_notes.txt")} | {
        "onnx/model.onnx",
        "link",
    }
    assert (saved / "link").is_symlink() and (saved / "model_card.md").read_text() == "card"
    assert not litter(saved.parent)


def test_real_tokenizer_beside_the_model(saved):
    from transformers import AutoTokenizer, BertTokenizer

    (saved.parent / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]))
    BertTokenizer(str(saved.parent / "vocab.txt")).save_pretrained(saved)
    pk.save(pk.load(saved), saved)
    assert AutoTokenizer.from_pretrained(saved)("good film")["input_ids"] == [2, 5, 6, 3]


# -- where to --------------------------------------------------------------------------------------------------


def test_parents_are_made_and_a_file_is_refused(tmp_path):
    small = small_model()
    pk.save(small, tmp_path / "a" / "b" / "m")
    assert pk.load(str(tmp_path / "a" / "b" / "m"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file: is a file; expected a folder"):
        pk.save(small, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and not litter(tmp_path)


def test_relative_path_and_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pk.save(small_model(), "m")
    assert pk.load("m") and not litter(tmp_path)


def test_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk" / "m").mkdir(parents=True)
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    for share in (0.5, 0.8):
        small = small_model(share=share)
        pk.save(small, tmp_path / "m")
        assert (tmp_path / "m").is_symlink() and (tmp_path / "disk" / "m" / "config.json").is_file()
        assert torch.equal(logits(pk.load(tmp_path / "m"), batch()), logits(small, batch()))
    assert not litter(tmp_path) and not litter(tmp_path / "disk")


def test_without_an_atomic_exchange(saved, monkeypatch):
    """Systems without renameat2: the old folder steps aside first."""
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    small = small_model(share=0.8)
    pk.save(small, saved)
    assert torch.equal(logits(pk.load(saved), batch()), logits(small, batch())) and not litter(saved.parent)
    before = content(saved)
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise OSError(errno.EIO, "no")
        return real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        pk.save(small_model(share=0.3), saved)
    monkeypatch.undo()
    assert content(saved) == before and pk.load(saved)


def test_models_that_are_not_compact_are_refused(tmp_path):
    model = build()
    for refused in (model, attached(model).model):
        with pytest.raises(ValueError, match=r"save: model is not compact \(DistilBertForSequenceClassification\)"):
            pk.save(refused, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- full disk and kill ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["first file", "second file", "sync"])
def test_full_disk_leaves_the_old_folder_and_no_litter(saved, when, monkeypatch):
    before = content(saved)
    other = small_model(share=0.8)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        real = type(other).save_pretrained

        def save_pretrained(self, folder, **kwargs):
            if when == "second file":
                real(self, folder, **kwargs)
                (Path(folder) / "model.safetensors").write_bytes(b"half")
            full()

        monkeypatch.setattr(type(other), "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="No space left"):
        pk.save(other, saved)
    monkeypatch.undo()
    assert content(saved) == before and not litter(saved.parent)
    assert pk.load(saved)
    pk.save(other, saved)  # and the next save goes through
    assert torch.equal(logits(pk.load(saved), batch()), logits(other, batch()))


def test_disk_that_is_really_full(saved):
    """A limit on the size of files, set in the child: the system itself says no in the middle of the write."""
    before = content(saved)
    done = python(
        """
        import resource, signal
        import prunekern as pk
        from tests.helpers.compact_folders import small_model
        other = small_model(share=0.0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            pk.save(other, sys.argv[1])
        except Exception as error:
            print(type(error).__name__, error)
            raise SystemExit(0)
        raise SystemExit("saved all the same")
        """,
        saved,
    )
    assert "File too large" in done.stdout or "os error 27" in done.stdout
    assert content(saved) == before and not litter(saved.parent)


@pytest.mark.parametrize("moment", ["half written", "before the exchange", "after the exchange"])
def test_kill_in_the_middle_leaves_a_whole_folder(saved, moment):
    before = content(saved)
    done = python(
        """
        import os, signal
        from pathlib import Path
        import prunekern as pk
        from prunekern import folders
        from tests.helpers.compact_folders import small_model
        moment, other = sys.argv[2], small_model(share=0.8)
        die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        real = type(other).save_pretrained
        if moment == "half written":
            def save_pretrained(self, folder, **kwargs):
                real(self, folder, **kwargs)
                file = Path(folder) / "model.safetensors"
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                die()
            type(other).save_pretrained = save_pretrained
        elif moment == "before the exchange":
            folders._put = die
        else:
            put = folders._put
            folders._put = lambda *a: (put(*a), die())
        pk.save(other, sys.argv[1])
        """,
        saved,
        moment,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    other = small_model(share=0.8)
    if moment == "after the exchange":
        assert torch.equal(logits(pk.load(saved), batch()), logits(other, batch()))
    else:
        assert content(saved) == before
        assert pk.load(saved)
    assert litter(saved.parent)
    pk.save(other, saved)
    assert torch.equal(logits(pk.load(saved), batch()), logits(other, batch())) and not litter(saved.parent)


def test_first_save_killed_leaves_no_folder_that_looks_complete(tmp_path):
    done = python(
        """
        import os, signal
        from tests.helpers.compact_folders import small_model
        import prunekern as pk
        from prunekern import folders
        folders._put = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        pk.save(small_model(), sys.argv[1])
        """,
        tmp_path / "m",
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
