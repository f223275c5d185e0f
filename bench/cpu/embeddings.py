"""What do smaller sentence embeddings keep, and how fast are they, beside the original on the backends people use?

    python -m bench.cpu.embeddings --train               # all-MiniLM-L6-v2, 25 and 50 % removed, into runs/embeddings
    .venv-peers/bin/python -m bench.cpu.embeddings       # quality and speed of all, one thread: table, JSON, plot
    python -m bench.cpu.embeddings --quick               # a few texts, few turns: does it run

--train distils on real text (news, movie reviews, Wikipedia, tweets; no labels), masked first and then, compact, in all
that is kept; it resumes where it was stopped, and takes an hour and a half of one core for half removed. Quality, on
texts that training never saw: Spearman's correlation with the original's cosines, overlap of the ten nearest texts,
accuracy of the nearest article's topic (bench/common/embedding_quality.py).
Speed: texts a second through `encode` as sentence-transformers has it, for 1, 32 and 256 texts of real lengths,
everybody in turn in one process, minima compared. Peers: bench/common/embedding_peers.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

import prunekern as pk
import prunekern.hf  # noqa: F401
from bench.common import progress, report, texts
from bench.common.embedding_peers import PEERS
from bench.common.embedding_quality import Embedded, quality
from bench.common.peers_models_narrow import Missing
from prunekern.demo.models import demo_model
from prunekern.machine.bf16_trap import bf16_matmul_crashes
from prunekern.machine.measure import interleaved, threads

RUNS = report.ROOT / "runs" / "embeddings"
SHARES = (0.25, 0.5)
COUNTS = (1, 32, 256)
SINGLES = 16  # texts that one at a time is timed with
KINDS = ("fp32", "bf16", "int8")
QUALITY = ("spearman", "nearest", "topics", "topics_kept", "cosine")
OPTIONS = {"batch_size": 16, "learning_rate": 2e-3, "stage_one": 0.7, "warm": 0.06, "ramp": 0.7, "max_length": 128}
RANK, STEPS = 16, 1000
KEPT = {"batch_size": 8, "learning_rate": 3e-4, "max_length": 256, "warmup_steps": 200}
KEPT_STEPS = 10_000


def train(shares: list[float], steps: int, kept_steps: int, limit: int | None, bf16: bool) -> None:
    """RUNS/SHARE/compact of every share; what is there already is left."""
    from prunekern.training.kept import train_kept
    from prunekern.training.recipe import TrainOptions
    from prunekern.training.sentences import distil_sentences

    data = texts.load().train[:limit]
    common = {"seed": 1, "bf16": bf16}
    for share in shares:
        out = RUNS / f"{share:.0%}".rstrip("%")
        if (out / "compact").is_dir():
            print(f"{out}: trained already", flush=True)
            continue
        written = out / "report.json"
        found = json.loads(written.read_text()) if (out / "masked").is_dir() else {"texts": len(data)}
        if not (out / "masked").is_dir():
            model = SentenceTransformer(str(demo_model("all-minilm-l6-v2")), device="cpu")
            config = pk.PruneConfig(rank=RANK, alpha=2 * RANK, sparsity=share, cost="macs")
            options = TrainOptions(max_steps=steps, save_steps=100, **OPTIONS, **common)
            longest = model.max_seq_length
            _, found["masked"] = distil_sentences(model, data, config, options, out, resume=True)
            (out / "report.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
            model.max_seq_length = longest
            pk.save(pk.compact(model), out / "masked")
        small, original = (
            pk.load(out / "masked"),
            SentenceTransformer(str(demo_model("all-minilm-l6-v2")), device="cpu"),
        )
        options = TrainOptions(max_steps=kept_steps, save_steps=500, **KEPT, **common)
        found["kept"] = train_kept(small, original, data, options, out / "kept", resume=True)
        pk.save(small, out / "compact")
        (out / "report.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def candidates(args, data: texts.Texts) -> tuple[dict[str, tuple[str, SentenceTransformer]], dict[str, str]]:
    """name -> (precision, model), the original in fp32 first; and who could not run, with the reason."""
    original = SentenceTransformer(str(demo_model("all-minilm-l6-v2")), device="cpu")
    found: dict[str, tuple[str, SentenceTransformer]] = {}
    missing = {}
    for name, (precision, make) in PEERS.items():
        if args.peers and name not in args.peers:
            continue
        if precision == "bf16" and bf16_matmul_crashes():
            missing[name] = "bf16 products of PyTorch kill the process on this CPU"
            continue
        try:
            found[name] = precision, make(original, data.train, args.threads)
        except Missing as error:
            missing[name] = str(error)
        gc.collect()
    for kind in KINDS:
        found[f"nothing removed, {kind}"] = kind, all_kept(original, kind)
    for share in args.shares:
        folder = RUNS / f"{share:.0%}".rstrip("%") / "compact"
        for kind in KINDS:
            if folder.is_dir():
                found[f"{share:.0%} removed, {kind}"] = kind, pk.load(folder, weights=kind)
            else:
                missing[f"{share:.0%} removed, {kind}"] = f"not trained: {folder.relative_to(report.ROOT)}"
    return found, missing


def all_kept(original: SentenceTransformer, kind: str) -> SentenceTransformer:
    """The original on our kernels: what a compact model's speed is without anything removed."""
    model = copy.deepcopy(original, {id(original.model_card_data): original.model_card_data})
    pk.attach(model, pk.PruneConfig(rank=1, sparsity=0.0))
    with tempfile.TemporaryDirectory() as folder:
        pk.save(pk.compact(model), folder)
        return pk.load(folder, weights=kind)


def embedded_by(name: str, model: SentenceTransformer, data: texts.Texts, kept: Path | None) -> Embedded:
    """All test texts. A peer's are kept in a folder, from one run to the next: some take minutes."""
    digest = hashlib.sha256("\n".join([*data.reviews, *data.paragraphs, *data.articles]).encode()).hexdigest()[:16]
    file = None if kept is None else kept / f"{name.replace(' ', '_')}-{digest}.npz"
    if file is not None and file.is_file():
        with np.load(file) as parts:
            return Embedded(parts["reviews"], parts["paragraphs"], parts["articles"])
    found = Embedded.of(lambda t: model.encode(t, batch_size=32, show_progress_bar=False), data)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, reviews=found.reviews, paragraphs=found.paragraphs, articles=found.articles)
    print(f"{name}: embedded", flush=True)
    return found


def some_texts(data: texts.Texts, count: int) -> list[str]:
    """Of real lengths, half sentences of reviews and half paragraphs."""
    half = count // 2
    return [*data.reviews[:half], *data.paragraphs[: count - half]]


def call(model: SentenceTransformer, chosen: list[str], alone: bool):
    if alone:
        return lambda: [model.encode([text], show_progress_bar=False) for text in chosen]
    return lambda: model.encode(chosen, batch_size=32, show_progress_bar=False)


def measure(models: dict[str, tuple[str, SentenceTransformer]], data: texts.Texts, args) -> dict[str, dict[str, float]]:
    """Texts a second by name and count."""
    speed: dict[str, dict[str, float]] = {name: {} for name in models}
    for count in args.only_speed or COUNTS:
        chosen = some_texts(data, SINGLES if count == 1 else count)
        calls = {name: call(model, chosen, count == 1) for name, (_, model) in models.items()}
        with progress.bar(f"{count} texts") as tell:
            best = interleaved(calls, args.seconds, 3 if args.quick else 5, turning=True, progress=tell)
        for name, seconds in best.items():
            speed[name][str(count)] = round(len(chosen) / seconds, 2)
    return speed


def plot(rows: list[dict], path: Path) -> None:
    """Quality against speed, a panel for each number of texts; ours joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, len(COUNTS), figsize=(15, 5), layout="constrained", sharey=True)
    marks = {"fp32": "o", "bf16": "s", "int8": "^"}
    for axis, count in zip(axes, COUNTS, strict=True):
        for row in rows:
            ours = "removed" in row["model"]
            at = row[f"texts_a_second_{count}"], row["spearman"]
            colour = "tab:red" if ours else "tab:blue"
            axis.plot(*at, marks[row["precision"]], color=colour, markersize=8)
            axis.annotate(row["model"], at, xytext=(5, 5), textcoords="offset points", fontsize=7)
        axis.set(xlabel=f"texts a second ({count} at a time, one thread)", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.3)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="Spearman's correlation with the original's cosines")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def summary(rows: list[dict]) -> dict[str, float]:
    """Half removed in int8 over the fastest int8 backend of the original, by number of texts; what it keeps."""
    ours = next((r for r in rows if r["model"] == "50% removed, int8"), None)
    theirs = [r for r in rows if r["precision"] == "int8" and "removed" not in r["model"]]
    if ours is None or not theirs:
        return {}
    keys = [f"texts_a_second_{count}" for count in COUNTS]
    ratios = {f"over best int8, {k.rpartition('_')[2]}": round(ours[k] / max(r[k] for r in theirs), 3) for k in keys}
    return ratios | {"spearman": ours["spearman"], "topics kept": ours["topics_kept"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kept-steps", type=int, default=KEPT_STEPS, help="of training all that is kept, afterwards")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--limit", type=int, help="so many training texts only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long to measure each number of texts")
    parser.add_argument("--peers", nargs="*", help="only these")
    parser.add_argument("--only-embed", action="store_true", help="the test texts by all peers, for the next run")
    parser.add_argument("--only-speed", type=int, nargs="+", metavar="COUNT", help="of so many texts, into --out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="embeddings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        train(args.shares, args.steps, args.kept_steps, args.limit, args.bf16)
        return
    data = texts.load()
    if args.quick:
        data = texts.Texts(
            data.train[:200], data.reviews[:200], data.paragraphs[:200], data.articles[:60], data.labels[:60]
        )
        args.seconds = 1.0
    with threads(args.threads):
        with torch.no_grad():
            models, missing = candidates(args, data)
        with torch.inference_mode():
            if args.only_speed:
                report.write(args.out, texts_a_second=measure(models, data, args), args=vars(args))
                return
            embedded = {}
            for name, (_, model) in models.items():
                if not args.only_embed or name in PEERS:
                    embedded[name] = embedded_by(name, model, data, RUNS / "peers" if name in PEERS else None)
            if args.only_embed:
                return
            found = {name: quality(e, embedded["torch"], data.labels) for name, e in embedded.items()}
            speed = measure(models, data, args)
    rows = [
        {
            "model": name,
            "precision": precision,
            **{key: round(found[name][key], 4) for key in QUALITY},
            **{f"texts_a_second_{count}": speed[name][str(count)] for count in COUNTS},
        }
        for name, (precision, _) in models.items()
    ]
    report.table("all-MiniLM-L6-v2, one thread", rows)
    for name, why in missing.items():
        print(f"{name}: {why}")
    print(summary(rows))
    if args.quick:
        return
    path = report.write(args.out, rows=rows, summary=summary(rows), missing=missing, args=vars(args))
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
