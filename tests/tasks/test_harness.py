"""lm-eval's commonsense tasks on local files: against log-likelihoods by hand, compact against masked, bad input."""

import copy
import importlib.metadata
import io
import json
import math
import os
import socket

import lm_eval.evaluator
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from tqdm import tqdm

import prunekern as pk
from prunekern.nn import CompactLinear
from prunekern.storage import progress
from prunekern.tasks import harness, harness_local
from prunekern.tasks.harness import QUOTED, evaluate_tasks
from tests.helpers.harness_items import (
    BOOLQ,
    CHARACTERS,
    CONTEXT,
    PIQA,
    RECORDS,
    by_hand,
    character_tokenizer,
    decoder,
    write,
)
from tests.helpers.tiny_decoders import FAMILIES
from tests.helpers.tiny_models import attached, prune


@torch.no_grad()
def likelihood(model, context, continuation, most=CONTEXT):
    """log p(continuation | context) of one sequence, unpadded."""
    start, rest = ([CHARACTERS.get(c, 3) for c in text] for text in (context, continuation))
    ids = torch.tensor([[1, *start, *rest]])[:, -most - 1 :]
    logs = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return logs.gather(1, ids[0, 1:, None])[-len(rest) :].sum().item()


def run(model, tokenizer, names, local, **options):
    """What evaluate_tasks returns, and the log-likelihoods lm-eval has got: {name: [items][choices]}."""
    found, real = [], lm_eval.evaluate

    def spy(*args, **kwargs):
        found.append(real(*args, **kwargs))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "evaluate", spy)
        scores = evaluate_tasks(model, tokenizer, names, local, **options)
    rows = {n: [[r[0] for r in s["filtered_resps"]] for s in samples] for n, samples in found[0]["samples"].items()}
    return scores, {name: rows[name] for name in scores["tasks"]}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    for name, records in RECORDS.items():
        write(folder, name, records)
    return folder


@pytest.fixture(scope="module")
def model():
    return decoder(dtype=torch.float64, seed=3)


@pytest.fixture(scope="module")
def ran(model, tokenizer, local):
    return run(model, tokenizer, QUOTED, local)


@pytest.fixture
def attempts(monkeypatch):
    """Connections tried: none gets through."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    return tried


# -- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUOTED)
def test_every_choice_is_that_of_likelihoods_by_hand(name, model, ran):
    scores, likelihoods = ran[0]["tasks"][name], ran[1][name]
    chosen, right = [], {"acc": [], "acc_norm": []}
    for i, got in enumerate(likelihoods):
        requests, choices, answer = by_hand(name, i)
        want = [likelihood(model, *request) for request in requests]
        assert got == pytest.approx(want, rel=1e-9)
        per_character = [w / len(choice) for w, choice in zip(want, choices, strict=True)]
        chosen.append(want.index(max(want)))
        right["acc"].append(chosen[-1] == answer)
        right["acc_norm"].append(per_character.index(max(per_character)) == answer)
    count = len(RECORDS[name])
    assert scores["items"] == len(likelihoods) == count
    assert scores["chosen"] == chosen
    assert scores["right"] == right[scores["quoted"]]
    assert (scores["acc_norm"] is None) == (name in ("boolq", "winogrande"))
    for metric in ("acc", "acc_norm") if scores["acc_norm"] is not None else ("acc",):
        share = sum(right[metric]) / count
        assert scores[metric] == pytest.approx(share)
        assert scores[f"{metric}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_the_items_tell_the_two_accuracies_apart(ran):
    """Otherwise the test above could not see one taken for the other."""
    tasks = ran[0]["tasks"].values()
    assert any(t["acc"] != t["acc_norm"] for t in tasks if t["quoted"] == "acc_norm")
    assert any(t["acc"] != t["acc_norm"] for t in tasks if t["quoted"] == "acc" and t["acc_norm"] is not None)
    assert len({choice for t in tasks for choice in t["chosen"]}) >= 3


def test_what_comes_back_is_plain_and_in_the_order_asked(ran, model, tokenizer, local):
    scores = ran[0]
    assert json.loads(json.dumps(scores)) == scores
    normed = {name for name, task in scores["tasks"].items() if task["quoted"] == "acc_norm"}
    assert list(scores["tasks"]) == list(QUOTED) and normed == {"hellaswag", "arc_challenge", "openbookqa"}
    assert scores["mean"] == pytest.approx(sum(t[QUOTED[n]] for n, t in scores["tasks"].items()) / 7)
    assert scores["lm_eval"] == importlib.metadata.version("lm_eval")
    assert scores["truncated"] == 0 and scores["limit"] is None
    assert all(t["num_fewshot"] == 0 and t["version"] > 0 for t in scores["tasks"].values())
    few = evaluate_tasks(model, tokenizer, ["winogrande", "boolq"], local, limit=2, batch_size=3)
    assert list(few["tasks"]) == ["winogrande", "boolq"] and few["limit"] == 2
    for name, task in few["tasks"].items():
        assert task["items"] == 2 and task["chosen"] == scores["tasks"][name]["chosen"][:2]
    one = evaluate_tasks(model, tokenizer, "boolq", local, limit=1)["tasks"]["boolq"]
    assert one["items"] == 1 and one["acc_stderr"] is None


def test_solved_examples_stand_before_the_item(model, tokenizer, tmp_path):
    example = {"question": "is snow white", "passage": "Snow is white.", "label": 1}
    write(tmp_path, "boolq", RECORDS["boolq"])
    write(tmp_path, "boolq", [example | {"idx": 7}, example | {"idx": 8}], "train")
    scores, likelihoods = run(model, tokenizer, ["boolq"], tmp_path, num_fewshot=1)
    shot = "Snow is white.\nQuestion: is snow white?\nAnswer: yes\n\n"
    for i, got in enumerate(likelihoods["boolq"]):
        requests = by_hand("boolq", i)[0]
        assert got == pytest.approx([likelihood(model, shot + c, rest) for c, rest in requests], rel=1e-9)
    assert scores["tasks"]["boolq"]["num_fewshot"] == 1


def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(tokenizer, local):
    def tokens(request):
        return 1 + len(request[0]) + len(request[1])

    most = tokens(by_hand("boolq", 0)[0][0]) - 1  # the last token is not read: this one just fits
    model = decoder(dtype=torch.float64, max_position_embeddings=most)
    scores, likelihoods = run(model, tokenizer, ["boolq"], local)
    requests = [by_hand("boolq", i)[0] for i in range(len(BOOLQ))]
    for got, pair in zip(likelihoods["boolq"], requests, strict=True):
        assert got == pytest.approx([likelihood(model, *request, most=most) for request in pair], rel=1e-9)
    assert scores["truncated"] == sum(tokens(request) > most + 1 for pair in requests for request in pair) > 1


def test_numbers_are_those_of_simple_evaluate(model, tokenizer, tmp_path, monkeypatch):
    """Which solved examples are drawn, too."""
    names = ["boolq", "arc_easy"]
    for name in names:
        write(tmp_path, name, RECORDS[name])
        write(tmp_path, name, RECORDS[name], "train")
    got, likelihoods = run(model, tokenizer, names, tmp_path, num_fewshot=2)
    for name in ("add_env_info", "get_git_commit_hash"):  # 4 s of pip, lscpu and git
        monkeypatch.setattr(lm_eval.evaluator, name, lambda *_: None)
    manager = TaskManager(include_defaults=False, include_path=[str(harness.definition(n).parent) for n in names])
    tasks = [{"task": n, **harness_local.source(tmp_path, n, manager.task_index[n].cfg, num_fewshot=2)} for n in names]
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    spec = [{"group": "all", "task": tasks}]
    want = lm_eval.simple_evaluate(lm, tasks=spec, num_fewshot=2, task_manager=manager)
    for name in names:
        task, found = got["tasks"][name], want["results"][name]
        for row, sample in zip(likelihoods[name], want["samples"][name], strict=True):
            assert row == pytest.approx([r[0] for r in sample["filtered_resps"]], rel=1e-9)
        assert [task["acc"], task["acc_norm"]] == [found["acc,none"], found.get("acc_norm,none")]
        assert task["acc_stderr"] == pytest.approx(found["acc_stderr,none"])
        assert [task["version"], task["num_fewshot"]] == [want["versions"][name], want["n-shot"][name]]


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_masked(family, tokenizer, local):
    """lm-eval pads on the right and passes no mask: the compact blocks see full rows."""
    masked = decoder(family)
    prune(attached(masked), 0.4, seed=2)
    small = pk.compact(masked)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    want, got = (run(m, tokenizer, QUOTED, local, batch_size=5) for m in (masked, small))
    assert got[0] == want[0]
    for name in QUOTED:
        for row, wanted in zip(got[1][name], want[1][name], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)  # fp32, sums of up to 40 characters


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_tied_head_stays_rounded(weights, tokenizer, local, tmp_path):
    """lm-eval ties the head to the embeddings again."""
    masked = decoder(tie_word_embeddings=True)
    prune(attached(masked), 0.4, seed=2)
    pk.save(pk.compact(masked), tmp_path / "small")
    small = pk.load(tmp_path / "small", weights=weights)
    scores, likelihoods = run(small, tokenizer, ["piqa"], local)
    head = small.get_output_embeddings()
    assert isinstance(head, CompactLinear) and head.weights == weights
    want = [[likelihood(small, *request) for request in by_hand("piqa", i)[0]] for i in range(len(PIQA))]
    for row, wanted in zip(likelihoods["piqa"], want, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


# -- where the items come from -----------------------------------------------------------------------------------


def test_local_items_touch_neither_network_nor_disk(attempts, model, tokenizer, local, ran, tmp_path):
    def tree():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in local.rglob("*")}

    before = tree()
    assert evaluate_tasks(model, tokenizer, QUOTED, local) == ran[0]
    assert attempts == []
    assert tree() == before
    assert not (tmp_path / "hf").exists()  # the cache of `datasets`, by conftest.py
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(attempts) == 1


def test_an_edited_file_is_read_anew(model, tokenizer, tmp_path, ran):
    right = ran[0]["tasks"]["boolq"]["right"]
    file = write(tmp_path, "boolq", RECORDS["boolq"])
    assert evaluate_tasks(model, tokenizer, "boolq", tmp_path)["tasks"]["boolq"]["right"] == right
    before = file.stat()
    write(tmp_path, "boolq", [record | {"label": 1 - record["label"]} for record in RECORDS["boolq"]])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert evaluate_tasks(model, tokenizer, "boolq", tmp_path)["tasks"]["boolq"]["right"] == [1 - r for r in right]


def test_without_local_the_hubs_data_sets_are_asked_for(model, tokenizer, ran, monkeypatch):
    import datasets

    asked = {
        ("aps/super_glue", "boolq"): "boolq",
        ("baber/piqa", None): "piqa",
        ("Rowan/hellaswag", None): "hellaswag",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
    }

    def load_dataset(path, name=None, **options):
        assert not options
        task = asked.pop((path, name))
        rows = datasets.Dataset.from_list(RECORDS[task])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert evaluate_tasks(model, tokenizer, QUOTED) == ran[0]
    assert asked == {}


def test_a_hub_out_of_reach_is_one_line_with_the_way_out(model, tokenizer, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(pk.tasks.DataError, match=r"'piqa' .*'baber/piqa' on the hub .*local=FOLDER") as raised:
        evaluate_tasks(model, tokenizer, "piqa")
    assert "\n" not in str(raised.value)


def test_one_bar_is_shown_and_nothing_else(model, tokenizer, local, capfd, caplog, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)  # short work shows none
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    bars = tqdm.__init__
    evaluate_tasks(model, tokenizer, ["hellaswag"], local, console=console)
    assert "evaluating" in screen.getvalue() and "12/12" in screen.getvalue()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert tqdm.__init__ is bars
    assert tokenizer.pad_token is None
