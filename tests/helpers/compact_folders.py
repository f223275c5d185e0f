"""A compact model to put into folders, and a fresh Python process that sees the tests' helpers."""

import subprocess
import sys
import textwrap
from pathlib import Path

import prunekern as pk
from tests.helpers.tiny_models import attached, build, prune

ROOT = str(Path(__file__).parents[2])


def small_model(family="distilbert", task="sequence", share=0.5, **options):
    model = build(family, task, **options)
    prune(attached(model), share)
    return pk.compact(model)


def python(code, *arguments, check=True):
    """Run code in a fresh process that sees this package and the tests' helper."""
    code = f"import sys; sys.path.insert(0, {ROOT!r})\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done
