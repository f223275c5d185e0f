"""bench/headline.py draws from the committed JSONs, and what it draws is what they say."""

from bench import headline
from bench.common import report


def test_kept_shares_are_by_kind_and_block():
    kept = {f"distilbert.transformer.layer.{i}.{kind}": [1 + i, 4] for i in (1, 0) for kind in headline.KINDS}
    assert headline.kept_shares(kept) == [[25.0, 50.0]] * len(headline.KINDS)


def test_bars_are_the_dense_peers_the_best_sliced_one_and_ours():
    models = report.read("models")
    for shape in headline.SHAPES:
        *dense, best, ours = headline.bars_of(models, shape)
        rows = [r for r in models["rows"] if (r["model"], r["batch_x_tokens"]) == (headline.MODEL, shape)]
        rows = [r for r in rows if r.get("precision", "fp32") == "fp32"]
        assert [ms for _, ms, _ in dense] == [r["dense_ms"] for r in rows] and len(dense) == 4
        assert best[1] == min(r["sliced_ms"] for r in rows) and ours[1] < best[1]


def test_the_picture_is_drawn(tmp_path):
    headline.draw(report.read("demo"), report.read("models"), tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000
