"""Texts of several classes, or none, to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .task import Task

if TYPE_CHECKING:
    from transformers import EvalPrediction


@dataclass(frozen=True)
class MultiLabelTask(Task):
    """`Task` where a text has any number of the classes.

    label_column: 0 or 1 for every class, [num_labels]. label_names: in their order. metric: "micro_f1", "macro_f1" or
    "exact_match", the larger the better.
    """

    @property
    def task_type(self) -> str:
        """One of TASK_TYPES."""
        return "multi-label"

    @property
    def problem_type(self) -> str | None:
        """What transformers' configs call the task; the loss is binary cross-entropy, class by class."""
        return "multi_label_classification"

    def label_feature(self) -> Any:
        """What `datasets` holds a row's labels as: fp32, as the loss takes them."""
        from datasets import List, Value

        return List(Value("float32"), length=self.num_labels)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """{metric: value} of all three, the task's own first. Raises ValueError, see `metrics.score_sets`.

        prediction.predictions: logits [rows, num_labels] (or a tuple that starts with them). prediction.label_ids: the
        same shape.
        """
        from . import metrics

        found = metrics.score_sets(prediction.predictions, prediction.label_ids)
        return {self.metric: found[self.metric], **found}
