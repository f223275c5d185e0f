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


def test_info_tells_which_arithmetic_runs():
    facts = pk.info()
    if facts["kernels"]:
        has_int8 = facts["isa"] in ("avx2_vnni", "avx512_vnni", "avx512_bf16", "amx")
        assert facts["arithmetic"][0] == "fp32" and ("int8" in facts["arithmetic"]) == has_int8
        pays, why = _native._C.bf16_verdict()
        assert facts["bf16"] == why and "\n" not in why
        if facts["isa"] == "avx512_bf16":
            assert ("bf16" in facts["arithmetic"]) == pays


def test_generic_kernels_have_fp32_arithmetic_alone():
    code = "import prunekern as pk; facts = pk.info(); print(facts['isa'], facts['arithmetic'])"
    text = subprocess.run(
        [sys.executable, "-c", code], env={"PRUNEKERN_ISA": "generic", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if _native._C is not None:
        assert text == "generic ['fp32']"


def test_info_measures():
    facts = pk.info(measure=True)
    if facts["kernels"]:
        assert 1 < facts["fp32_peak"] < 1000
        for kind in ("bf16", "int8"):
            assert (facts[f"{kind}_peak"] is not None) >= (kind in facts["arithmetic"] and facts["isa"] != "amx")
            assert facts[f"{kind}_peak"] is None or 1 < facts[f"{kind}_peak"] < 20000
        if "int8" in facts["arithmetic"]:
            assert facts["int8_peak"] > 1.5 * facts["fp32_peak"]  # vpdpbusd: four times as many on CPUs measured so far
        assert 0.5 < facts["read_bandwidth"] < 500


def test_info_warns_where_bf16_products_kill(monkeypatch):
    module = info_file
    monkeypatch.setattr(module, "bf16_matmul_crashes", lambda: True)
    monkeypatch.setattr(module, "peak_gflops", lambda **_: 1.0)
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
        assert text == (
            "False no C++ kernels: PRUNEKERN_ISA must be generic, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 or "
            "amx (got mmx)"
        )
