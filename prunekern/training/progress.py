"""What is seen of a training run: loss, accuracy of the training batches, share removed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pruning.pruner import Pruner
from ..storage.progress import Bar


class RichProgress(TrainerCallback):
    """Replaces transformers' own bar (`disable_tqdm=True`). Loss and accuracy are running means over ~20 steps.

    Where output is a file it prints a line now and then instead.
    """

    def __init__(self, pruner: Pruner | None, console: Console | None = None, what: str = "training"):
        """pruner: None for a run without one, of which `what` is the name."""
        self.pruner, self.console, self.what = pruner, console, what
        self.bar: Bar | None = None
        self.hook: RemovableHandle | None = None
        self.means: dict[str, float] = {}
        self.removed = ""
        self.loss_logged = False  # and not seen in the model's own output

    def _observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        labels, logits = kwargs.get("labels"), getattr(output, "logits", None)
        if not model.training or labels is None or logits is None or output.loss is None:
            return
        seen = {"loss": output.loss.item()}
        if logits.dim() == 2 and logits.shape[-1] > 1 and not labels.is_floating_point():
            seen["accuracy"] = (logits.argmax(-1) == labels).float().mean().item()
        for name, value in seen.items():
            self.means[name] = value if name not in self.means else 0.95 * self.means[name] + 0.05 * value

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Show the bar, on the first of several processes."""
        if not state.is_world_process_zero:
            return
        self.bar = Bar(TextColumn("{task.fields[text]}"), console=self.console)
        name = self.what if self.pruner is None else "stage one"
        self.task = self.bar.add_task(name, total=state.max_steps, completed=state.global_step, text="")
        if self.pruner is not None:
            self.hook = self.pruner.model.register_forward_hook(self._observe, with_kwargs=True)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move it, and say what was seen."""
        if self.bar is None:
            return
        parts = [f"{name} {value:.3f}" for name, value in self.means.items()]
        stage = self.what
        if self.pruner is not None:
            if state.global_step % 5 == 0 or not self.removed:  # a sum over all channel groups: not at every step
                self.removed = f"removed {100 * self.pruner.expected_sparsity():.1f} %"
            stage = "stage two" if self.pruner.finalized else "stage one"
            parts.append(self.removed)
        self.bar.update(self.task, completed=state.global_step, description=stage, text="  ".join(parts))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """The loss, where the model itself says none: a loss around it does."""
        loss = (logs or {}).get("loss")
        if loss is not None and (self.loss_logged or "loss" not in self.means):
            self.means["loss"], self.loss_logged = float(loss), True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Take the bar and the hook away, also after an error."""
        if self.hook is not None:
            self.hook.remove()
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.hook = None
