"""info(): what it tells, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import torch

import prunekern as pk
from prunekern import _native
from prunekern.machine import info as info_file


def test_info_tells_what_runs_here():
    facts = pk.info()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["kernels"] == _native.available()
    if facts["kernels"]:
        assert facts["remedy"] is None
        assert facts["isa"] in facts["cpu_isas"]
        assert facts["cpu_isas"][0] == "generic"
    else:
        assert facts["isa"] is None and "\n" not in facts["remedy"]


def test_info_tells_of_amx_and_openmp():
    facts = pk.info()
    assert "fp32_peak" not in facts
    if facts["kernels"]:
        assert facts["amx"] == "works" or "\n" not in facts["amx"]
        assert (facts["amx"] == "works") == ("amx" in facts["cpu_isas"])
        assert any("omp" in name for name in facts["openmp"])
    assert facts["warnings"] == [] or len(facts["openmp"]) > 1


def test_info_measures():
    facts = pk.info(measure=True)
    if facts["kernels"]:
        assert 1 < facts["fp32_peak"] < 1000
        assert 0.5 < facts["read_bandwidth"] < 500


def test_info_warns_where_bf16_products_kill(monkeypatch):
    module = info_file
    monkeypatch.setattr(module, "bf16_matmul_crashes", lambda: True)
    monkeypatch.setattr(module, "peak_gflops", lambda: 1.0)
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1.0)
    assert not any("illegal instruction" in text for text in pk.info()["warnings"])
    assert any("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16" in text for text in pk.info(measure=True)["warnings"])
    monkeypatch.setattr(module, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    assert any("2 OpenMP runtimes" in text for text in pk.info()["warnings"])


def test_info_imports_no_transformers():
    code = "import sys, prunekern as pk; pk.info(); print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_info_without_the_core_says_how_to_get_it():
    code = """
import sys
sys.modules["prunekern._C"] = None
import prunekern as pk
facts = pk.info()
print(facts["kernels"], facts["isa"], facts["cpu_isas"], facts["remedy"])
"""
    text = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert text.startswith("False None [] no C++ kernels: ") and "apt-get install g++" in text
    assert "\n" not in text


def test_info_tells_a_bad_override():
    code = "import prunekern as pk; facts = pk.info(); print(facts['kernels'], facts['remedy'])"
    text = subprocess.run(
        [sys.executable, "-c", code], env={"PRUNEKERN_ISA": "mmx", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if _native._C is not None:
        assert text == "False no C++ kernels: PRUNEKERN_ISA must be generic, avx2, avx512 or amx (got mmx)"
