"""What `PruneTrainer` and `PruneCallback` make of each of transformers' TrainingArguments: honoured, or refused by name
before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from ..machine.bf16_trap import BF16_REASON, bf16_matmul_crashes
from .schedule import refuse_schedule

# Honoured by what `PruneTrainer` does in Trainer's place, or minds.
OURS = frozenset(
    "output_dir learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "num_train_epochs max_steps gradient_accumulation_steps average_tokens_across_devices label_smoothing_factor bf16 "
    "fp16 torch_compile torch_compile_backend torch_compile_mode auto_find_batch_size save_only_model save_strategy "
    "save_on_each_node load_best_model_at_end train_sampling_strategy seed data_seed resume_from_checkpoint "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph".split()
)
# Honoured by Trainer, whose way past what is ours does not lead.
TRAINERS = frozenset(
    "per_device_train_batch_size per_device_eval_batch_size adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "bf16_full_eval fp16_full_eval tf32 use_cache neftune_noise_alpha torch_empty_cache_steps "
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "save_steps save_total_limit enable_jit_checkpoint metric_for_best_model greater_is_better ignore_data_skip "
    "restore_callback_states_from_checkpoint full_determinism use_cpu accelerator_config dataloader_drop_last "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name "
    "ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval do_predict local_rank".split()
)
# Without what they belong to they say nothing.
BELONGING = {
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
    **{
        name: "push_to_hub"
        for name in "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision".split()
    },
}
# name: (what it must be, why). Anything that counts as true is refused.
REFUSED = {
    "fsdp": (
        "off",
        "it splits the parameters that masks and shrinking need whole; data parallel training is supported",
    ),
    "deepspeed": (
        "off",
        "it splits the parameters that masks and shrinking need whole; data parallel training is supported",
    ),
    "parallelism_config": ("None", "it splits layers and sequences; data parallel training (torchrun) is supported"),
    "use_liger_kernel": ("False", "its kernels go past the masked layers"),
    "optim_target_modules": ("None", "optimisers that project gradients are refused"),
    "push_to_hub": (
        "False",
        "a checkpoint is an adapter, which no card of transformers describes; push the compact model with "
        "prunekern.push_to_hub",
    ),
}
# Optimisers by how their names begin: those that take the model or choose parameters themselves, and would train mask
# logits like weights or not at all.
OPTIMIZERS = {
    "galore": "it projects gradients of parameters it chooses itself",
    "apollo": "it projects gradients of parameters it chooses itself",
    "lomo": "it steps in the backward pass, before there is a whole gradient",
    "adalomo": "it steps in the backward pass, before there is a whole gradient",
    "schedule_free": "its weights in training are not those it ends with, and masks would be chosen by the former",
}


def check_arguments(
    args: TrainingArguments,
    final_learning_rate: float | None,
    objective: Callable[..., Any] | None = None,
    who: str = "PruneTrainer",
) -> None:
    """ValueError for an argument that pruning cannot honour; RuntimeError for bf16 where it would kill the process.

    final_learning_rate: what the caller gave, None where nothing. objective: as of `PruneTrainer`.
    who: the caller, for messages.
    """
    for name, (accepted, why) in REFUSED.items():
        value = getattr(args, name)
        if value:
            raise ValueError(f"{who}: {name} must be {accepted} (got {value!r}): {why}")
    if args.bf16 and args.device.type == "cpu" and bf16_matmul_crashes():
        raise RuntimeError(f"{who}: bf16 must be False: {BF16_REASON}")
    _refuse_optimizer(str(getattr(args.optim, "value", args.optim)), who)
    refuse_schedule(args, final_learning_rate, who)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name) or {}).get("use_reentrant"):
            raise ValueError(
                f"{who}: {name} must not have use_reentrant (got True): embeddings are frozen, and no gradient "
                "would reach the blocks behind them"
            )
    if objective is not None and args.label_smoothing_factor:
        raise ValueError(
            f"{who}: label_smoothing_factor must be 0 with an objective, which computes the loss "
            f"(got {args.label_smoothing_factor})"
        )
    if args.torch_compile and args.world_size > 1:
        raise ValueError(
            f"{who}: torch_compile must be False with several processes (got True): their wrapper is made anew "
            "between the stages, and a compiled one would hide it"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{who}: one process must have one GPU (got {args.n_gpu}): start it by torchrun, one process a "
            "GPU, or set CUDA_VISIBLE_DEVICES"
        )


def _refuse_optimizer(name: str, who: str) -> None:
    for start, why in OPTIMIZERS.items():
        if name.startswith(start):
            raise ValueError(f"{who}: optim must not be {name!r}: {why}")
