"""Which TrainingArguments `PruneTrainer` cannot honour: refused by name, before anything is trained."""

from __future__ import annotations

from transformers import TrainingArguments

from ..machine.bf16_trap import BF16_REASON, bf16_matmul_crashes


def check_arguments(args: TrainingArguments, final_learning_rate: float | None) -> None:
    """ValueError for an argument that pruning cannot honour; RuntimeError for bf16 where it would kill the process."""
    if args.load_best_model_at_end:
        raise ValueError(
            "PruneTrainer: load_best_model_at_end must be False (got True): the best checkpoint may lie before "
            "the budget was met"
        )
    if args.bf16 and args.device.type == "cpu" and bf16_matmul_crashes():
        raise RuntimeError(f"PruneTrainer: bf16 must be False: {BF16_REASON}")
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "PruneTrainer: fsdp and deepspeed must be off: they split the parameters that masks and shrinking need "
            "whole; data parallel training (torchrun) is supported"
        )
    if final_learning_rate is not None and not args.learning_rate > 0:
        raise ValueError(
            f"PruneTrainer: learning_rate must be positive with a final_learning_rate (got {args.learning_rate})"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"PruneTrainer: one process must have one GPU (got {args.n_gpu}): start it by torchrun, one process a "
            "GPU, or set CUDA_VISIBLE_DEVICES"
        )
