"""Faults: bad calls, damaged folders, kills, full disks, forks, threads. `python -m bench.faults`."""
