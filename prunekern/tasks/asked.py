"""What the caller of `files.load` asks for, made definite: by its arguments, by the file's columns, by its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .labels import Rows
from .sources import conll
from .sources.readers import column_names
from .task import TASK_TYPES

LISTS = (".jsonl", ".json", ".parquet")  # their columns may hold lists


@dataclass(frozen=True)
class Asked:
    """As of `files.load`. text: one column or two. task_type: None until the labels have decided.

    label_columns: where each class has a column of its own; else (label,).
    """

    text: tuple[str, ...]
    label_columns: tuple[str, ...]
    task_type: str | None
    metric: str | None
    label_separator: str | None

    @property
    def label(self) -> str:
        """The label's column; of several, what the task calls them together."""
        if len(self.label_columns) == 1:
            return self.label_columns[0]
        return "labels" if "labels" not in self.text else "classes"

    def for_rows(self, train: Rows) -> Asked:
        """With the task type that lists among labels say; scalars may still be classes or scores."""
        first = next((place for place, label in enumerate(train.labels) if label is not None), None)
        if self.task_type is not None or first is None or not isinstance(train.labels[first], list):
            return self
        words = [isinstance(text, list) for text in train.texts[first]]
        return self.as_type("tokens" if all(words) else "multi-label")

    def as_type(self, task_type: str) -> Asked:
        """ValueError where the metric or the number of text columns is not for it."""
        from .metrics import METRICS

        if self.metric is not None and self.metric not in METRICS[task_type]:
            raise _unfit_metric(self.metric, task_type)
        if task_type == "tokens" and len(self.text) > 1:
            raise ValueError(f"text must be one column of words for task_type 'tokens' (got {self.text!r})")
        return replace(self, task_type=task_type)


def asked_of(
    path: Path,
    text: str | Sequence[str] | None,
    label: str | None,
    task_type: str | None,
    regression: bool | None,
    metric: str | None,
    label_columns: Sequence[str] | None,
    label_separator: str | None,
) -> Asked:
    """Arguments of `files.load`, with the names of columns that they leave open. path: the training file.

    ValueError for one out of range, or two that contradict each other; what `column_names` raises of the file.
    """
    if label is not None and not isinstance(label, str):
        raise ValueError(f"label must be one column (got {label!r}); label_columns are those of 0 or 1")
    if label_separator is not None and (label_columns is not None or label_separator == ""):
        beside = " with label_columns" if label_columns is not None else ""
        raise ValueError(f"label_separator must be what stands between classes (got {label_separator!r}{beside})")
    if label_columns is not None and (label is not None or isinstance(label_columns, str) or len(label_columns) < 2):
        beside = f" with label {label!r}" if label is not None else ""
        raise ValueError(f"label_columns must be two columns or more, without a label (got {label_columns!r}{beside})")
    task_type = _task_type(path, task_type, regression, metric, label_columns, label_separator)
    tagged = task_type == "tokens"
    texts = ("tokens" if tagged else "text",) if text is None else (text,) if isinstance(text, str) else tuple(text)
    labels = tuple(label_columns or (("tags" if tagged else "label") if label is None else label,))
    if len(texts) not in (1, 2) or len({*texts, *labels}) != len(texts) + len(labels):
        shown = labels[0] if len(labels) == 1 else labels
        raise ValueError(f"text must be one or two columns, not the label's (got {texts!r}, {shown!r})")
    if tagged and path.suffix.lower() in conll.EXTENSIONS and (text is not None or label is not None):
        raise ValueError(
            f"data file {path} has no named columns: text and label must not be given (got {texts!r}, {labels[0]!r})"
        )
    if task_type is None and text is None and path.suffix.lower() in LISTS:
        names = column_names(path)
        if "text" not in names and "tokens" in names:
            texts, labels = ("tokens",), ("tags" if label is None else label,)
    if label is not None and "," in label:
        names = column_names(path)
        if label not in names and {part.strip() for part in label.split(",")} <= {*names}:
            raise ValueError(
                f"label must be one column (got {label!r}); label_columns (--label-columns) are those of 0 or 1"
            )
    asked = Asked(texts, labels, None, metric, label_separator)
    return asked if task_type is None else asked.as_type(task_type)


def _task_type(
    path: Path,
    task_type: str | None,
    regression: bool | None,
    metric: str | None,
    label_columns: Sequence[str] | None,
    label_separator: str | None,
) -> str | None:
    """What the arguments say of it; None where they do not decide."""
    from .metrics import METRICS

    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)} (got {task_type!r})")
    suffix = path.suffix.lower()
    for argument, value, kind in (
        ("regression", regression, "regression" if regression else "classification"),
        ("label_columns", label_columns, "multi-label"),
        ("label_separator", label_separator, "multi-label"),
        ("extension", suffix if suffix in conll.ALWAYS else None, "tokens"),
    ):
        if value is not None:
            if task_type not in (None, kind):
                raise ValueError(f"task_type must be {kind!r} with {argument} {value!r} (got {task_type!r})")
            task_type = kind
    if metric is None or task_type is not None:
        return task_type
    fitting = [kind for kind, metrics in METRICS.items() if metric in metrics]
    if not fitting:
        raise _unfit_metric(metric, None)
    return fitting[0] if len(fitting) == 1 else None


def _unfit_metric(metric: str, task_type: str | None) -> ValueError:
    from .metrics import METRICS

    kinds = [task_type] if task_type is not None else [*METRICS]
    of = {"classification": "a classification", "regression": "a regression"}
    first, *others = (f"of {of.get(kind, kind)}" for kind in kinds)
    accepted = [", ".join(METRICS[kind]) for kind in kinds]
    rest = "".join(f", {kind} one of {names}" for kind, names in zip(others, accepted[1:], strict=True))
    return ValueError(f"metric {first} must be one of {accepted[0]} (got {metric!r}){rest}")
