"""How far a Trainer is: `progress.bar` over its steps."""

from __future__ import annotations

from contextlib import ExitStack

from transformers import PrinterCallback, Trainer, TrainerCallback

from bench.common import progress


class Steps(TrainerCallback):
    """A bar, or lines, from the first step to the last."""

    def __init__(self, what: str):
        self.what, self.open, self.tell = what, ExitStack(), None

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell = self.open.enter_context(progress.bar(self.what))

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(state.global_step / state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        self.open.close()


def train(trainer: Trainer, what: str, **options) -> None:
    """`trainer.train(**options)`, told by `Steps` in place of what transformers prints."""
    steps = Steps(what)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    with steps.open:
        trainer.train(**options)
