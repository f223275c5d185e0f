"""Runs a file of interpreted/ in a child process, where Triton is told before it is imported what to do."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "kernels" / "interpreted"
CHECKS = sorted(path.name for path in HERE.glob("check_*.py"))


def run(name: str, **environment: str) -> None:
    """Fails unless all checks of the file pass, and there are some."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    if "TRITON_INTERPRET" not in environment and find_spec("xdist"):
        command += ["-n", "8"]  # on a GPU nearly all the time is compilation
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(HERE / name)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 5, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout and "xfailed" not in done.stdout, done.stdout[-2000:]
