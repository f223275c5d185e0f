"""Every public name of 0.1.0's first layout is importable from where it was; see prunekern/_moved.py."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import prunekern as pk

# One line a module, as they were before they moved into rooms: "module: name name ...".
BEFORE = dict(line.split(": ", 1) for line in Path(__file__).with_name("public_names.txt").read_text().splitlines())
FUNCTIONS = ("attach", "plan", "compact", "info")  # of the package, named as the module they came from


@pytest.mark.parametrize("module", BEFORE)
def test_names_are_importable_from_where_they_were(module):
    found = importlib.import_module(module)
    missing = [name for name in BEFORE[module].split() if not hasattr(found, name)]
    assert not missing, f"{module} lacks {missing}"


def test_no_module_hides_a_function():
    """Importing `prunekern.plan`, which was a module, leaves the function of that name in its place."""
    code = "import prunekern as pk\n" + "".join(
        f"import prunekern.{name}\nfrom prunekern.{name} import {name} as f\nassert pk.{name} is f and callable(f)\n"
        for name in FUNCTIONS
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_old_paths_give_what_is_there_now():
    from prunekern.compacting import latency
    from prunekern.families.decoders import heads as decoder
    from prunekern.families.encoders import heads as encoder
    from prunekern.machine import measure

    old = importlib.import_module("prunekern.measure")
    assert old.interleaved is measure.interleaved and old.latency is latency.latency
    assert importlib.import_module("prunekern.families.encoder").HeadLayout is encoder.EncoderLayout
    assert importlib.import_module("prunekern.families.decoder").HeadLayout is decoder.DecoderLayout
    assert pk.stock.save_stock is pk.save_stock
    with pytest.raises(AttributeError, match="prunekern.measure.*no attribute 'nope'.*prunekern.machine.measure"):
        _ = old.nope
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("prunekern.nope")


def test_replacing_a_name_by_its_old_path_replaces_it():
    """Whoever patches the old module means the code that runs, and gets back what was there."""
    from prunekern.machine import bf16_trap

    before = bf16_trap.REMEDY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekern.bf16_trap.REMEDY", "another")
        assert bf16_trap.REMEDY == "another"
    assert bf16_trap.REMEDY == before


def test_old_paths_import_nothing_until_asked():
    """Other libraries walk through sys.modules and ask every module for its file."""
    code = (
        "import sys, inspect, prunekern\n"
        "for m in list(sys.modules.values()):\n"
        "    getattr(m, '__file__', None), getattr(m, '__warningregistry__', None)\n"
        "inspect.getmodule(lambda: 0)\n"
        "assert not [n for n in sys.modules if n.startswith(('transformers', 'prunekern.pruning'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
