"""Metrics by name, over scikit-learn, scipy and `entities`. All of them but "mse": the larger the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .entities import IGNORED, entity_f1, marks_spans

CLASSIFICATION = ("accuracy", "matthews")
REGRESSION = ("pearson", "spearman", "mse")
CORRELATIONS = ("pearson", "spearman")
MULTI_LABEL = ("micro_f1", "macro_f1", "exact_match")
TOKENS = ("entity_f1", "accuracy")
# By `Task.task_type`; the first is what a task is scored by when nothing else is asked for.
METRICS = {"classification": CLASSIFICATION, "regression": REGRESSION, "multi-label": MULTI_LABEL, "tokens": TOKENS}


def score(metric: str, predictions: Any, labels: Any) -> float:
    """One number for a split.

    metric: "accuracy" (share of rows), "matthews" (correlation coefficient), "pearson" (correlation),
        "spearman" (of the ranks), "mse" (mean squared error). The correlations are undefined where all predictions are
        equal, and 0 then.
    predictions: logits [rows, classes] for a classification, [rows] or [rows, 1] for a regression; or a tuple
        that starts with them. labels: [rows].
    Raises ValueError: unknown metric, no rows, shapes that do not fit, NaN or infinity in the predictions (a
    diverged model must not get a score), a label outside the classes (GLUE's hidden test labels are -1).
    """
    if metric not in CLASSIFICATION + REGRESSION:
        raise ValueError(f"metric must be one of {', '.join(CLASSIFICATION + REGRESSION)} (got {metric!r})")
    if isinstance(predictions, tuple):
        predictions = predictions[0]
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{metric}: labels must be [rows] with at least one row (got shape {labels.shape})")
    if not np.isfinite(predictions).all():
        raise ValueError(f"{metric}: predictions must be finite (got NaN or infinity)")
    if metric in REGRESSION:
        return _regression(metric, predictions, labels)
    if predictions.ndim != 2 or len(predictions) != len(labels):
        raise ValueError(
            f"{metric}: predictions must be logits [{len(labels)}, classes] (got shape {predictions.shape})"
        )
    classes = predictions.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"{metric}: labels must be in 0..{classes - 1} (got {bad}; -1 marks a hidden test label)")
    predicted = predictions.argmax(axis=1)
    if metric == "accuracy":
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(labels, predicted))
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def score_sets(predictions: Any, labels: Any) -> dict[str, float]:
    """MULTI_LABEL of a split where a row may have several classes, or none.

    predictions: logits [rows, classes], a class being said of a row where its logit is above 0 (its probability above
        one half); or a tuple that starts with them. labels: 0 or 1, [rows, classes].
    "micro_f1": F1 of all answers together; "macro_f1": the mean of the classes' F1, which is 0 for a class that nobody
    names; "exact_match": share of the rows with every class right.
    Raises ValueError: shapes that do not fit, NaN or infinity in the predictions, labels that are neither 0 nor 1.
    """
    from sklearn.metrics import accuracy_score, f1_score

    predictions, labels = (
        np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions),
        np.asarray(labels),
    )
    if labels.ndim != 2 or len(labels) == 0 or predictions.shape != labels.shape:
        raise ValueError(
            f"multi-label: predictions must be logits and labels 0 or 1, both [rows, classes] with at least one row "
            f"(got shapes {predictions.shape} and {labels.shape})"
        )
    if not np.isfinite(predictions).all():
        raise ValueError("multi-label: predictions must be finite (got NaN or infinity)")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"multi-label: labels must be 0 or 1 (got {labels[~np.isin(labels, (0, 1))][0]})")
    wanted, said = labels.astype(np.int8), (predictions > 0).astype(np.int8)
    return {
        "micro_f1": float(f1_score(wanted, said, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(wanted, said, average="macro", zero_division=0)),
        "exact_match": float(accuracy_score(wanted, said)),
    }


def score_tokens(predictions: Any, labels: Any, names: Sequence[str]) -> dict[str, float]:
    """Share of the labelled words that are right, "accuracy", and, where the tags mark spans, "entity_f1".

    predictions: logits [rows, tokens, classes], or a tuple that starts with them. labels: [rows, tokens], IGNORED
        (-100) where nothing is asked. names: of the tags, in the order of their numbers.
    "entity_f1": F1 over whole entities, right where kind, beginning and end are (Tjong Kim Sang & De Meulder, CoNLL
    2003); 0 where neither the labels nor the predictions have one. What is IGNORED is left out before spans are read.
    Raises ValueError: shapes that do not fit, no label at all, NaN or infinity in a prediction that counts, a label
    outside the classes.
    """
    predictions, labels = (
        np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions),
        np.asarray(labels),
    )
    if labels.ndim != 2 or predictions.shape != (*labels.shape, len(names)):
        raise ValueError(
            f"tokens: predictions must be logits [rows, tokens, {len(names)}] and labels [rows, tokens] (got shapes "
            f"{predictions.shape} and {labels.shape})"
        )
    counts = labels != IGNORED
    if not counts.any():
        raise ValueError(f"tokens: labels must not all be {IGNORED}")
    if not np.isfinite(predictions[counts]).all():
        raise ValueError("tokens: predictions must be finite (got NaN or infinity)")
    asked = labels[counts]
    if asked.min() < 0 or asked.max() >= len(names):
        bad = asked[(asked < 0) | (asked >= len(names))][0]
        raise ValueError(f"tokens: labels must be in 0..{len(names) - 1}, or {IGNORED} (got {bad})")
    said = predictions.argmax(axis=-1)
    found = {"accuracy": float(np.mean(said[counts] == asked))}
    if marks_spans(names):
        rows = [
            [[names[tag] for tag in tags[row_counts]] for tags, row_counts in zip(all_tags, counts, strict=True)]
            for all_tags in (labels, said)
        ]
        found = {"entity_f1": entity_f1(*rows), **found}
    return found


def _regression(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    flat = predictions[:, 0] if predictions.ndim == 2 and predictions.shape[1] == 1 else predictions
    least = 2 if metric in CORRELATIONS else 1
    if flat.shape != labels.shape or len(labels) < least:
        raise ValueError(
            f"{metric}: predictions must be [{len(labels)}] or [{len(labels)}, 1] with at least {least} rows "
            f"(got shape {predictions.shape})"
        )
    if not np.isfinite(labels).all():
        raise ValueError(f"{metric}: labels must be finite (got NaN or infinity)")
    flat, labels = flat.astype(np.float64), labels.astype(np.float64)
    if metric == "mse":
        return float(np.mean((flat - labels) ** 2))
    if np.ptp(labels) == 0:
        raise ValueError(f"{metric}: labels must not all be equal (got {labels[0]} in every row)")
    if np.ptp(flat) == 0:
        return 0.0
    from scipy.stats import pearsonr, spearmanr

    return float((pearsonr if metric == "pearson" else spearmanr)(flat, labels).statistic)
