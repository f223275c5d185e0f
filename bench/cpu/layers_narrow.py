"""The tables of 8 and 16 bits of bench/cpu/layers.py: peers of the same arithmetic, and its own peak."""

from __future__ import annotations

import argparse

from torch import Tensor

from bench.common import peaks, peers_narrow, progress
from bench.common.answers import decibel, geomean, randn
from bench.common.peers_narrow import GIVEN, OURS, WIDE
from bench.common.turns import race
from bench.cpu.layer_tables import Table, not_measured, wanted

PRECISIONS = ("bf16", "int8")
# Of random weights and inputs, one layer: bf16 keeps 8 bits (52 dB), int8 by row or by tensor 41 to 45.
LEAST = {"bf16": 45.0, "int8": 33.0, "fp32": 100.0}
FEW, MANY = 4, 128
PEAK = "peak"
# (what is compared, what must hold of the geometric mean from MANY rows), by precision. Of
# several others the fastest counts: of those whose names begin so.
AGAINST = {
    "bf16": {
        "F.linear": (OURS, "F.linear", 1.0),
        "best bf16 x": (GIVEN, ("F.linear bf16", "oneDNN bf16"), 1.0),
        "fp32": (OURS, WIDE, 1.0),
    },
    "int8": {
        "dynamic": (OURS, ("dynamic",), 1.2),
        "qlinear": (OURS, "qlinear", 0.95),
        "qlinear int8 x": (OURS, "qlinear int8 x", None),
        "fp32": (OURS, WIDE, 1.0),
    },
}
OF_PEAK = {"bf16": 0.88, "int8": 0.80}


def seconds_of(best: dict[str, float], who: str | tuple[str, ...]) -> float:
    """Of one, or of the fastest of those whose names begin so."""
    return best[who] if isinstance(who, str) else min(s for name, s in best.items() if name.startswith(who))


def table(precision: str, args: argparse.Namespace, bandwidth: float) -> Table:
    """One row per shape: 1e9 operations a second of each peer, ours over them, of the peak, the answer's decibels."""
    rows = []
    for n, k in args.shapes:
        weight, bias = randn(n, k, seed=1) / k**0.5, randn(n, seed=2)
        for m in args.rows:
            rows.append(row_of(precision, weight, bias, randn(m, k), args, bandwidth))
        progress.say(f"  {precision}: {n} x {k} done")
    return f"{precision} linear layers: 1e9 operations a second, and ours over the peers", rows, held(precision, rows)


def row_of(precision: str, weight: Tensor, bias: Tensor, x: Tensor, args, bandwidth: float) -> dict:
    (n, k), m = weight.shape, x.shape[0]
    exact = x.double() @ weight.double().T + bias.double()
    runs, noise = {}, {}
    for name, make in peers_narrow.PEERS[precision].items():
        prepare, run = make(weight, bias, m)
        given = prepare(x)
        noise[name] = decibel(run(given).double(), exact)
        if not noise[name] >= LEAST["fp32" if name == WIDE else precision]:
            raise SystemExit(f"{name}, {precision}: wrong answer ({noise[name]:.1f} dB)")
        runs[name] = lambda run=run, given=given: run(given)
    operations = 2 * m * n * k
    if m >= MANY and peaks.run_peak(1, precision):  # in turn with the others: the clock moves
        runs[PEAK] = lambda: peaks.run_peak(operations, precision)
    best = race(runs, args.seconds)
    peak, own = best.pop(PEAK, None), best[OURS]
    row = {"rows": m, "N": n, "K": k, **{name: round(operations / s / 1e9, 1) for name, s in best.items()}}
    for name, (one, other, _) in AGAINST[precision].items():
        row[f"x {name}"] = round(seconds_of(best, other) / best[one], 3)
    row["ours us"] = round(own * 1e6, 1)
    row["of peak"] = round(peak / own / args.threads, 3) if peak else None
    size = n * k * (1 if precision == "int8" else 2)
    row["of bandwidth"] = round(size / own / 1e9 / bandwidth, 3) if m <= FEW else None
    row["dB"] = round(noise[OURS], 1)
    row["all dB"] = round(min(noise.values()), 1)
    return row


def held(precision: str, rows: list[dict]) -> dict[str, dict]:
    """What must hold of the table."""
    many = [row for row in rows if row["rows"] >= MANY]
    holds = {}
    for name, (_, _, least) in AGAINST[precision].items():
        what = f"{precision} x {name}, from {MANY} rows"
        value = geomean(row[f"x {name}"] for row in many)
        holds[what] = (
            {"value": round(value, 3), "wanted": None, "holds": None} if least is None else wanted(value, least)
        )
    lowest = min(rows, key=lambda row: row["x fp32"])
    holds[f"{precision} x fp32, lowest of any rows"] = wanted(lowest["x fp32"], 1.0) | {
        "at": f"{lowest['rows']} rows, {lowest['N']} x {lowest['K']}"
    }
    of_peak = [row["of peak"] for row in many if row["of peak"]]
    holds[f"{precision} of its peak, from {MANY} rows"] = (
        wanted(geomean(of_peak), OF_PEAK[precision])
        if of_peak
        else not_measured(OF_PEAK[precision], "the C++ core has no peak of this arithmetic here")
    )
    return holds
