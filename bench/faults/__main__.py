"""What does not break: bad calls, damaged folders, kills while saving and in training, full disks, forks, threads.

    make faults                        # or python -m bench.faults: about 10 minutes of two cores
    python -m bench.faults --few       # a tenth of it, to see that it runs

Ends with status 1 where anything crashed, was lost or wrong; what it was stands below the table and in the JSON.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch  # noqa: E402

from ..common import progress, report  # noqa: E402
from .tally import BAD, Tally  # noqa: E402

ROOMS = ("calls", "folders", "saving", "training", "system")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROOMS, nargs="+", default=list(ROOMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", type=int, default=1000, help="damaged folders")
    parser.add_argument("--saves", type=int, default=50, help="kills while saving")
    parser.add_argument("--runs", type=int, default=20, help="kills in training")
    parser.add_argument("--few", action="store_true", help="a tenth of the folders and kills")
    parser.add_argument("--out", default="faults", help="bench/results/OUT.json")
    return parser.parse_args()


def work(args: argparse.Namespace, scratch: Path) -> dict[str, Callable[[], list[Tally]]]:
    """By room; imported when called, so that a child of one does not pay for all."""

    def calls() -> list[Tally]:
        from . import calls

        return [calls.run()]

    def folders() -> list[Tally]:
        from . import folders

        return folders.run(args.seed, args.folders // (10 if args.few else 1), scratch)

    def saving() -> list[Tally]:
        from . import kills

        return [kills.saving(args.seed, args.saves // (10 if args.few else 1), scratch)]

    def training() -> list[Tally]:
        from . import kills

        return [kills.training(args.seed, args.runs // (10 if args.few else 1), scratch)]

    def system() -> list[Tally]:
        from . import system

        return system.run(args.seed, scratch, args.few)

    return {"calls": calls, "folders": folders, "saving": saving, "training": training, "system": system}


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory() as folder:
        for room, run in work(args, Path(folder)).items():
            if room in args.only:
                start = time.perf_counter()
                tallies += run()
                progress.say(f"{room}: {time.perf_counter() - start:.0f} s")
    rows = [tally.row() for tally in tallies]
    report.table("Faults", rows)
    bad = [f"{tally.kind}: {one}" for tally in tallies for one in tally.bad]
    for one in bad:
        progress.say(one)
    report.write(args.out, title="Faults", seed=args.seed, rows=rows, bad=bad)
    return int(any(tally.counts[outcome] for tally in tallies for outcome in BAD))


if __name__ == "__main__":
    raise SystemExit(main())
