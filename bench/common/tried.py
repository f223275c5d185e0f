"""Whether a peer kills its process on this CPU: asked of a process of its own, on a tiny model.

python -m bench.common.tried int8 OpenVINO      # exit status 0, or the signal that ended it
"""

from __future__ import annotations

import subprocess
import sys

import torch

from bench.common import shapes
from bench.common.peers_models_narrow import PEERS
from bench.common.report import ROOT


def dies(precision: str, peer: str) -> bool:
    """Whether a signal ends a process that runs the peer; an exception is told where the peer is built in earnest."""
    command = [sys.executable, "-m", "bench.common.tried", precision, peer]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode < 0


@torch.no_grad()
def main() -> None:
    precision, peer = sys.argv[1:]
    (name,) = shapes.TINY
    PEERS[precision][peer](shapes.dense_model(name), *shapes.inputs(1, 16), 1)()


if __name__ == "__main__":
    main()
