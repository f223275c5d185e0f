"""Metrics against their definitions, written out here, and refusals to score what must not be scored."""

import numpy as np
import pytest

from prunekern.tasks import metrics


def logits(predicted, classes):
    return np.eye(classes)[predicted] * 3.0 - 1.0


def matthews_definition(predicted, labels):
    """Two classes, from the four counts (Matthews 1975)."""
    tp, tn = np.sum(predicted & labels), np.sum((1 - predicted) & (1 - labels))
    fp, fn = np.sum(predicted & (1 - labels)), np.sum((1 - predicted) & labels)
    return (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_the_definitions(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 129)
    predicted = np.where(rng.random(129) < 0.7, labels, 1 - labels)
    assert metrics.score("accuracy", logits(predicted, 2), labels) == pytest.approx(
        np.mean(predicted == labels), abs=1e-12
    )
    expected = matthews_definition(predicted, labels)
    assert metrics.score("matthews", logits(predicted, 2), labels) == pytest.approx(expected, abs=1e-12)
    assert metrics.score("matthews", (logits(predicted, 2), "hidden states"), labels) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_pearson_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0, 5, 129)
    predicted = 0.3 * labels + rng.normal(size=129)
    x, y = predicted - predicted.mean(), labels - labels.mean()
    expected = (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert metrics.score("pearson", predicted, labels) == pytest.approx(expected, abs=1e-12)
    assert metrics.score("pearson", predicted[:, None], labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_spearman_and_mse_equal_the_definitions(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, 65) / 2  # with ties
    predicted = labels**3 + rng.normal(size=65)
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == x)) for x in v]) for v in (predicted, labels)]
    x, y = (r - r.mean() for r in ranks)
    expected = (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert metrics.score("spearman", predicted[:, None], labels) == pytest.approx(expected, abs=1e-12)
    assert metrics.score("mse", predicted, labels) == pytest.approx(np.mean((predicted - labels) ** 2), rel=1e-12)
    assert metrics.score("mse", np.ones(1), np.zeros(1)) == 1.0 and metrics.score("mse", np.ones(2), np.zeros(2)) == 1.0


def test_three_classes():
    assert metrics.score("accuracy", logits([0, 1, 2, 2, 1], 3), np.array([0, 1, 2, 1, 0])) == pytest.approx(0.6)


def test_undefined_correlations_are_zero():
    labels = np.array([0, 1, 0, 1])
    assert metrics.score("matthews", logits([1, 1, 1, 1], 2), labels) == 0.0
    assert metrics.score("pearson", np.full(4, 2.5), labels.astype(float)) == 0.0


@pytest.mark.parametrize("metric", metrics.CLASSIFICATION + metrics.REGRESSION)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_gets_no_score(metric, bad):
    predictions = np.ones((4, 1 if metric == "pearson" else 2))
    predictions[2, 0] = bad
    with pytest.raises(ValueError, match=f"{metric}: predictions must be finite"):
        metrics.score(metric, predictions, np.array([0, 1, 0, 1]))


@pytest.mark.parametrize("metric", metrics.CLASSIFICATION)
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_outside_the_classes(metric, label):
    with pytest.raises(
        ValueError, match=rf"{metric}: labels must be in 0..1 \(got {label}; -1 marks a hidden test label"
    ):
        metrics.score(metric, logits([0, 1, 1], 2), np.array([0, label, 1]))


def test_labels_of_a_regression():
    with pytest.raises(ValueError, match="pearson: labels must be finite"):
        metrics.score("pearson", np.arange(3.0), np.array([0, np.nan, 1]))
    with pytest.raises(ValueError, match=r"pearson: labels must not all be equal \(got -1"):  # hidden: all are -1
        metrics.score("pearson", np.arange(3.0), np.full(3, -1.0))


@pytest.mark.parametrize(
    "metric, predictions, labels, pattern",
    [
        (
            "f1",
            np.ones((2, 2)),
            np.zeros(2, int),
            r"metric must be one of accuracy, matthews, pearson, spearman, mse \(got 'f1'\)",
        ),
        (
            "accuracy",
            np.ones((3, 2)),
            np.zeros(2, int),
            r"predictions must be logits \[2, classes\] \(got shape \(3, 2\)",
        ),
        ("accuracy", np.ones(2), np.zeros(2, int), r"predictions must be logits \[2, classes\]"),
        ("accuracy", np.ones((0, 2)), np.zeros(0, int), r"labels must be \[rows\] with at least one row"),
        ("pearson", np.ones((3, 2)), np.zeros(3), r"predictions must be \[3\] or \[3, 1\]"),
        ("pearson", np.ones(1), np.zeros(1), r"with at least 2 rows"),
    ],
)
def test_shapes_that_do_not_fit(metric, predictions, labels, pattern):
    with pytest.raises(ValueError, match=pattern):
        metrics.score(metric, predictions, labels)
