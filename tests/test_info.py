"""info(): what it tells, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import torch

import prunekern as pk
from prunekern import _native


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
