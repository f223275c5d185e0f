"""Metrics by name, over scikit-learn and scipy. All of them but "mse": the larger the better."""

from __future__ import annotations

from typing import Any

import numpy as np

CLASSIFICATION = ("accuracy", "matthews")
REGRESSION = ("pearson", "spearman", "mse")
CORRELATIONS = ("pearson", "spearman")


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
