"""bench/cpu/layers.py runs to its end: every answer right, every table in the JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.common.report import ROOT
from prunekern import _native


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
def test_quick_run(tmp_path):
    code = f"""
import sys, pathlib
sys.argv = ["layers.py", "--quick"]
from bench.common import report
from bench.cpu import layers
report.RESULTS = pathlib.Path({str(tmp_path)!r})
layers.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "layers.json").read_text())
    assert {"layers", "indices", "one row", "kinds", "mlp", "bf16", "int8", "summary"} <= set(result)
    assert all(row["x best"] > 0 for row in result["layers"])
    for precision, least in (("bf16", 45), ("int8", 33)):
        assert all(min(row["dB"], row["all dB"]) >= least for row in result[precision])
        assert any(name.startswith(f"{precision} x ") for name in result["summary"])
    for name in ("layers", "layers_bf16", "layers_int8"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
