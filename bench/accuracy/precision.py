"""What does arithmetic in 16 and 8 bits cost in accuracy, of compact models and of dense ones that others quantise?

    make demo                                              # runs/demo: a quarter removed
    prunekern demo --sparsity 0 --out runs/demo-dense      # the same training, nothing removed
    make peers-venv                                        # NNCF and CTranslate2
    .venv-peers/bin/python -m bench.accuracy.precision     # ~15 minutes on one thread
    python -m bench.accuracy.precision --texts 256         # the first of them only

Everyone answers the same texts of the demo's test split, padded to one shape; told are accuracy, the share of
predictions that are those of the same model in fp32, and the decibels of the logits against them. Then all take turns
on one batch of that shape, without padding. OpenVINO's ranges of activations are calibrated on training texts. A peer
that is not installed is named with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import prunekern as pk
from bench.common import bits, peers_models, progress, report, safe
from bench.common import peers_models_narrow as narrow
from bench.common.answers import decibel
from prunekern import tasks
from prunekern.machine.measure import interleaved, threads
from prunekern.ops.packing import WEIGHTS

DENSE, COMPACT = "dense", "compact"
CALIBRATED = 256  # training texts
# Dense peers: zentorch is left out, which makes noise of CTranslate2's answers in the same process.
PEERS = {
    "eager": ("fp32", peers_models.eager),
    "eager bf16": ("bf16", narrow.eager_bf16),
    "OpenVINO bf16": ("bf16", narrow.openvino_bf16),
    "PyTorch dynamic": ("int8", narrow.dynamic),
    "ONNX Runtime dynamic": ("int8", narrow.onnx_dynamic),
    narrow.STATIC: ("int8", narrow.openvino_static),
    "CTranslate2": ("int8", narrow.ctranslate),
}


class Texts:
    """A split as batches of one shape. `ids` and `mask` [batch, length] hold one of them; contestants read these two
    tensors at every call."""

    def __init__(self, task, tokenizer, split: str, batch: int, length: int, count: int | None = None):
        data = task.encode(tokenizer, length)[split]
        self.rows = data["input_ids"][:count]
        self.labels = torch.tensor(data["labels"][:count])
        self.pad = tokenizer.pad_token_id
        self.ids = torch.full((batch, length), self.pad)
        self.mask = torch.zeros(batch, length, dtype=torch.int64)
        self.fill(0)

    def fill(self, first: int) -> int:
        """Puts the texts from `first` on into the tensors, the last one again where there are no more; how many."""
        here = self.rows[first : first + len(self.ids)]
        self.ids.fill_(self.pad)
        self.mask.zero_()
        for i in range(len(self.ids)):
            row = torch.tensor(here[min(i, len(here) - 1)])
            self.ids[i, : len(row)] = row
            self.mask[i, : len(row)] = 1
        return len(here)

    def batches(self) -> Iterator[int]:
        for first in range(0, len(self.rows), len(self.ids)):
            yield self.fill(first)


def dense_model(folder: Path) -> nn.Module:
    """The model of an ordinary folder, or of a compact one from which nothing was removed, as transformers' own."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    del config.quantization_config
    model = AutoModelForSequenceClassification.from_config(config)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        made = "prunekern demo --sparsity 0 --out runs/demo-dense"
        raise SystemExit(f"--dense: channels were removed from {folder}; make one without: {made}") from error
    return model.eval()


def contestants(dense: nn.Module, folder: Path, test: Texts, train: Texts, args) -> tuple[dict, list[dict]]:
    """({(model, who, precision): a function that gives the logits of what `test` holds}, who is missing and why)."""
    calls, missing = {}, []
    for who, (precision, make) in PEERS.items():
        try:
            if who == narrow.STATIC:
                call = calibrated(dense, test, train, args.threads)
            else:
                call = make(dense, test.ids, test.mask, args.threads)
        except narrow.Missing as why:
            missing.append({"peer": who, "why": str(why)})
            progress.say(f"{who}: {why}")
            continue
        calls[DENSE, who, precision] = call
    for weights in WEIGHTS:
        for activations in ("float",) if weights == "fp32" else ("float", "auto"):
            small = pk.load(folder, weights=weights, activations=activations)
            call = peers_models.eager(small, test.ids, test.mask, args.threads)
            calls[COMPACT, f"prunekern, activations {activations}", weights] = call
    return calls, missing


def calibrated(dense: nn.Module, test: Texts, train: Texts, count: int) -> peers_models.Call:
    """OpenVINO's static int8, ranges from training texts."""
    inputs = [(train.ids.clone(), train.mask.clone()) for _ in train.batches()]
    with peers_models.quiet():
        graph = narrow.static_graph(dense, inputs)
        return peers_models.openvino_call(graph, test.ids, test.mask, count, "f32")


def answers(call, test: Texts) -> Tensor:
    """Logits [texts, labels]."""
    return torch.cat([call()[:count].clone() for count in test.batches()])


def rows_of(logits: dict[tuple, Tensor], labels: Tensor, seconds: dict[tuple, float]) -> list[dict]:
    """One row for each contestant, beside the same model in fp32."""
    rows = []
    for (model, who, precision), found in logits.items():
        wide = next(other for (of, _, p), other in logits.items() if (of, p) == (model, "fp32"))
        right, wide_right = (x.argmax(1) == labels for x in (found, wide))
        row = {"model": model, "who": who, "precision": precision}
        row["accuracy_%"] = round(100 * right.double().mean().item(), 2)
        row["minus_fp32"] = round(100 * (right.double().mean() - wide_right.double().mean()).item(), 2)
        row["same_predictions_%"] = round(100 * (found.argmax(1) == wide.argmax(1)).double().mean().item(), 2)
        row["SQNR_dB"] = round(decibel(found.double(), wide.double()), 1) if found is not wide else None
        row["ms"] = round(1e3 * seconds[model, who, precision], 2)
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compact", type=Path, default=Path("runs/demo/compact"), help="folder, with a tokenizer")
    parser.add_argument(
        "--dense", type=Path, default=Path("runs/demo-dense/compact"), help="folder of a trained model, nothing removed"
    )
    parser.add_argument("--task", default="reviews")
    parser.add_argument("--texts", type=int, help="of the test split; all of it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens; what is longer is cut, as in the demo")
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long to take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="precision")
    args = parser.parse_args()
    for name in ("compact", "dense"):
        if not (getattr(args, name) / "config.json").exists():
            parser.error(f"--{name}: no model in {getattr(args, name)}; --help says what makes one")
    return args


@torch.no_grad()
def main() -> None:
    args = parse()
    safe.without_amx_if_it_kills()
    disable_progress_bar()
    disable_progress_bars()
    task, tokenizer = tasks.get(args.task), AutoTokenizer.from_pretrained(args.compact)
    test = Texts(task, tokenizer, task.score_split, args.batch, args.length, args.texts)
    train = Texts(task, tokenizer, "train", args.batch, args.length, CALIBRATED)
    with threads(args.threads):
        calls, missing = contestants(dense_model(args.dense), args.compact, test, train, args)
        logits = {}
        for key, call in progress.track([*calls.items()], "answering"):
            logits[key] = answers(call, test)
        test.mask.fill_(1)  # CTranslate2 leaves padding out, and would be timed on less
        with progress.bar("taking turns") as tell:
            seconds = interleaved(calls, args.seconds, progress=tell)
    rows = rows_of(logits, test.labels, seconds)
    report.table(f"{task.name}: {len(test.labels)} texts; ms of {args.batch} x {args.length} tokens", rows)
    if missing:
        report.table("not measured", missing)
    right = {" ".join(key): bits.packed(found.argmax(1) == test.labels) for key, found in logits.items()}
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report.write(args.out, task=args.task, rows=rows, missing=missing, right=right, args=shown)


if __name__ == "__main__":
    main()
