"""The picture of a training run."""

import pytest

from prunekern.training import curves

REPORT = {"target": 0.5, "by_kind": {"query_key": [3, 8], "value": [4, 8], "ffn": [9, 16], "residual": [5, 8]}}


def history(moving, steps=6):
    kept = {f"kept/{kind}": 0.75 for kind in REPORT["by_kind"]}
    rows = [{"step": s, "loss": str(1 / (s + 1)), "sparsity": s / 12} for s in range(steps)]
    return [row | ({"flips": 3, **kept} if row["step"] < moving else {}) for row in rows]


@pytest.mark.parametrize("moving", [0, 3, 6])
def test_plot(tmp_path, moving):
    import matplotlib.image

    path = tmp_path / "a.png"
    curves.plot(history(moving), REPORT, path)
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300 and len({tuple(p) for p in image[::7, ::7].reshape(-1, image.shape[2])}) > 5


def test_lines_are_the_log_s():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    curves.draw(axes, history(3), REPORT)
    (loss,) = axes[0].get_lines()
    assert list(loss.get_xdata()) == list(range(6)) and list(loss.get_ydata()) == [1 / (s + 1) for s in range(6)]
    kept = {line.get_label(): list(line.get_ydata()) for line in axes[1].get_lines()}
    assert kept == {
        "query / key": [75.0, 75.0, 75.0, 37.5],
        "value": [75.0, 75.0, 75.0, 50.0],
        "ffn": [75.0, 75.0, 75.0, 56.25],
        "residual": [75.0, 75.0, 75.0, 62.5],
    }


def test_nothing_logged(tmp_path):
    curves.plot([], {**REPORT, "by_kind": {}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
