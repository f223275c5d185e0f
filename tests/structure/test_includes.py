"""Who may include whom in csrc: the order of its rooms, read from every #include."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))

# include (the public API) < kernels < loops < ops < python. `cpu` chooses the table of kernels and hands it to the
# ops: it stands beside the loops, which take the table they are given and never ask for one.
MAY_INCLUDE = {
    "include": set(),
    "kernels": {"include"},
    "loops": {"include", "kernels"},
    "cpu": {"include", "kernels"},
    "ops": {"include", "kernels", "loops", "cpu"},
    "python": {"include", "kernels", "loops", "cpu", "ops"},
    "tests": {"include", "kernels", "loops", "cpu", "ops"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|numpy)/|^Python\.h$")
INSTRUCTION_SET = re.compile(r"amx|avx|vnni|\bsse|\bneon\b", re.IGNORECASE)


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def room_of(name: str) -> str:
    return "include" if name.startswith("prunekern/") else name.split("/")[0]


def includes(path: Path, quote: str) -> list[str]:
    return [name for kind, name in INCLUDE.findall(path.read_text()) if kind == quote]


def arrows() -> list[tuple[str, str]]:
    """(file, what it includes) of everything of ours."""
    return [(name_of(path), name) for path in FILES for name in includes(path, '"')]


def test_every_file_stands_in_a_room():
    assert FILES
    assert [name_of(path) for path in FILES if room_of(name_of(path)) not in MAY_INCLUDE] == []


def test_includes_are_written_from_the_root_of_csrc():
    missing = [(a, b) for a, b in arrows() if not any((root / b).is_file() for root in (CSRC, CSRC / "include"))]
    assert missing == []


def test_no_include_points_right():
    wrong = [(a, b) for a, b in arrows() if room_of(b) not in MAY_INCLUDE.get(room_of(a), set()) | {room_of(a)}]
    assert wrong == []


def test_no_circle_between_rooms():
    graph: dict[str, set[str]] = {}
    for a, b in arrows():
        graph.setdefault(room_of(a), set()).update({room_of(b)} - {room_of(a)})
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_the_python_room_knows_python_and_nobody_torch():
    for path in FILES:
        foreign = [name for kind in '<"' for name in includes(path, kind) if FOREIGN.match(name)]
        allowed = room_of(name_of(path)) == "python"
        assert [name for name in foreign if not allowed or name.startswith(("torch", "ATen", "c10"))] == [], path


def test_loops_and_ops_name_no_instruction_set():
    named = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in FILES
        if room_of(name_of(path)) in ("loops", "ops")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if INSTRUCTION_SET.search(line)
    ]
    assert named == []
