"""One process of training runs, to be started alone or by torch.distributed.run: BATCH OUT STOP [OUT STOP ...].

A run trains on rows in order, without dropout; STOP > 0: ends there, as a kill would; a checkpoint in OUT is resumed
from. Writes OUT/rank-R.json: losses, plan, thresholds, a digest of all that was learned. Several runs, one after the
other, share what a process takes to start, which is more than they take themselves.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

import prunekern as pk
from prunekern.training.trainer import last_checkpoint
from tests.helpers.tiny_models import attached, build

OFF = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(5, 50, (64, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.int64), "labels": int(i) % 3}


class Watch(TrainerCallback):
    def __init__(self, pruner, stop):
        self.pruner, self.stop, self.thresholds, self.flips = pruner, stop, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.thresholds.append(float(next(iter(self.pruner.masks.values())).threshold))
        self.flips.append(self.pruner.flips)
        control.should_training_stop |= state.global_step == self.stop


def train(out, batch, stop):
    out.mkdir(parents=True, exist_ok=True)
    set_seed(0)  # what a run begins with is not what the one before it left
    pruner = attached(build(**OFF), sparsity=0.4)
    watch = Watch(pruner, stop)
    trainer = pk.PruneTrainer(
        args=TrainingArguments(
            output_dir=str(out / "run"),
            max_steps=12,
            per_device_train_batch_size=batch,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=7,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
        ),
        pruner=pruner,
        train_dataset=Rows(),
        callbacks=[watch],
        mask_learning_rate=0.1,
        final_learning_rate=1e-3,
        stage_one=0.6,
        warm=0.2,
        ramp=0.4,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(out / "run") is not None)
    learned = b"".join(p.detach().numpy().tobytes() for _, p in sorted(trainer.model.named_parameters()))
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(
            {
                "world": trainer.args.world_size,
                "losses": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
                "plan": pruner.plan().to_dict(),
                "shrunk": pruner.shrunk,
                "thresholds": watch.thresholds,
                "flips": watch.flips,
                "saliency": [m.saliency.tolist() for m in pruner.masks.values()],
                "digest": hashlib.sha256(learned).hexdigest(),
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder, stop in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        train(Path(folder), int(sys.argv[1]), int(stop))
