"""prunekern train --task embeddings: a SentenceTransformer distilled from itself on texts without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import reading
from .kinds import kinds_table
from .options import console

if TYPE_CHECKING:
    from ..pruning.config import PruneConfig
    from ..training.recipe import TrainOptions

TASK = "embeddings"
BATCH_SIZE = 16
KEPT_BATCH_SIZE, KEPT_RATE = 8, 3e-4  # of whole weights


def refuse_others(**given: Any) -> None:
    """ValueError for an option of other tasks: texts have no columns, labels or splits."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} must not be given with --task {TASK} (got {value!r})")


def train_embeddings(
    model: str, source: str, data: Path | None, config: PruneConfig, options: TrainOptions, out: Path, resume: bool,
    weights: str | None, kept_steps: int | None = None, kept_lr: float | None = None,
    batch_size: int | None = None,
) -> None:  # fmt: skip
    """Train, save OUT/compact, OUT/adapter, OUT/report.json and .png, and say how near the embeddings are.

    weights: bits that OUT/compact is to be scored in besides. kept_steps: of training all that is kept; OUT/compact is
    then that model, and OUT/adapter the masked one it came from. batch_size: of both, where a user gave one.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(f"--task {TASK} needs sentence-transformers: pip install 'prunekern[st]'") from None
    from ..compacting.checkpoint import load, save
    from ..compacting.compact import compact
    from ..pruning.adapter import save_adapter
    from ..training.curves import plot
    from ..training.kept import train_kept
    from ..training.recipe import refuse_missing, write_report
    from ..training.sentences import agreement, distil_sentences, embed, held_out, read_texts

    if options.rule != "learned":  # what it would be for, OUT/stock, is no folder of sentence-transformers
        raise ValueError(f"--rule must be learned with --task {TASK} (got {options.rule!r})")
    if data is None:
        raise ValueError(f"--data must name a file with a text a line for --task {TASK}")
    train, score = held_out(read_texts(data))
    refuse_missing(source)
    with reading(source):
        dense = SentenceTransformer(source)
    longest = dense.max_seq_length
    theirs = embed(dense, score) if score else None
    # Saliency is gathered at no rate here: the model teaches itself nothing as long as it is whole.
    options = replace(
        options,
        stage_one=0.5 if options.stage_one is None else options.stage_one,
        warm=0.12 if options.warm is None else options.warm,
        ramp=0.6 if options.ramp is None else options.ramp,
    )
    pruner, trained = distil_sentences(dense, train, config, options, out, resume, console)
    save_adapter(pruner, out / "adapter")
    small, kept, scores = compact(dense), {}, {}
    for one in (dense, small):
        if longest is not None:
            one.max_seq_length = longest
    if kept_steps is not None:
        if theirs is not None:
            scores["before all that is kept is trained"] = agreement(embed(small, score), theirs)
        rate = KEPT_RATE if kept_lr is None else kept_lr
        more = replace(
            options,
            max_steps=kept_steps,
            learning_rate=rate,
            batch_size=batch_size or KEPT_BATCH_SIZE,
            warmup_steps=min(200, kept_steps // 10),
        )
        with reading(source):
            original = SentenceTransformer(source)
        kept["kept"] = train_kept(small, original, train, more, out / "kept", resume, console)
    save(small, out / "compact")
    plan = pruner.plan()
    if theirs is not None:
        scores["compact"] = agreement(embed(small, score), theirs)
        if weights is not None:
            scores[weights] = agreement(embed(load(out / "compact", weights=weights), score), theirs)
    write_report(
        out,
        task=TASK,
        model=model,
        config=config,
        options=options,
        trained=trained,
        score=scores,
        texts={"train": len(train), "held_out": len(score)},
        block_params={"compact": plan.params(), "dense": plan.dense_params()},
        **kept,
    )
    plot(trained["history"], trained, out / "report.png")
    title = f"{TASK}: {100 * trained['sparsity']:.2f} % of the block {config.cost} removed"
    console.print(kinds_table(title, trained["by_kind"]))
    for name, found in scores.items():
        console.print(
            f"{len(score)} texts held out, {name}: cosine with the original's embeddings {found['cosine']:.4f}, "
            f"rank correlation of cosines {found['spearman']:.4f}"
        )
    console.print(f"{out / 'compact'}  {out / 'adapter'}  {out / 'report.json'}  {out / 'report.png'}")
