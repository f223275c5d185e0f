"""The rooms of the house: who may import whom (CONTRIBUTING.md has the picture). Read from the source, nothing runs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prunekern"
# Each room may know itself and what is named here: an import never points right in
# kernels < _native < ops < nn < families < compacting < (exporting, pruning) < training < (demo, serving) < cli.
CHAIN = ("kernels", "_native", "ops", "nn", "families", "compacting")
MAY_KNOW = {room: {*CHAIN[:i]} for i, room in enumerate(CHAIN)}
MAY_KNOW |= {"storage": set(), "tasks": {"storage"}, "machine": {"kernels", "_native", "ops", "version"}}
ASIDE = {"storage", "tasks", "machine", "version"}  # known to whoever stands above `ops`, and knowing none of them
MAY_KNOW["compacting"] |= ASIDE
MAY_KNOW["exporting"] = MAY_KNOW["pruning"] = {*CHAIN, *ASIDE}
MAY_KNOW["training"] = {*CHAIN, *ASIDE, "exporting", "pruning"}
MAY_KNOW["demo"] = MAY_KNOW["serving"] = MAY_KNOW["training"] | {"training"}
MAY_KNOW["cli"] = MAY_KNOW["demo"] | {"demo", "serving"}
MAY_KNOW["_native"] = {"_C"}
MAY_KNOW["hf"] = {"compacting", "pruning"}  # a front door: compact models, and masked ones
MAY_KNOW["__main__"] = {"cli"}
FRONT = ("_C", "_native", "_moved")  # private to the package as a whole, not to a file
ABOVE_TORCH = ("transformers", "datasets", "peft", "accelerate")


def module_of(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(file: Path) -> list[tuple[tuple[str, ...], str, int]]:
    """(module, name or "", line) of everything of ours that a file imports, wherever in it."""
    found = []
    here = module_of(file) if file.name == "__init__.py" else module_of(file)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(tuple(a.name.split(".")), "", node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found += [(module, a.name, node.lineno) for a in node.names]
    return [entry for entry in found if entry[0][0] == "prunekern"]


def room_of(module: tuple[str, ...], name: str = "") -> str:
    """The room a module is in; "version" for what the package itself holds."""
    if len(module) > 1:
        return module[1]
    is_room = name == "_C" or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if name and is_room else "version"


def arrows() -> dict[tuple[str, str], str]:
    """(from room, to room) -> where."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        own = room_of(module_of(file)) if file.parent != PACKAGE else file.stem
        if own == "__init__":
            continue  # the front door: lazy, and knows where everything is
        for module, name, line in imports(file):
            to = room_of(module, name)
            if to != own:
                found.setdefault((own, to), f"{file.relative_to(ROOT)}:{line}")
    return found


def test_no_import_points_right():
    wrong = [f"{at}: {own} must not know {to}" for (own, to), at in arrows().items() if to not in MAY_KNOW.get(own, ())]
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_files():
    """Of imports at a file's top level and within functions alike."""
    files = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    knows: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, file in files.items():
        targets = {(*m, n) if (*m, n) in files else m for m, n, _ in imports(file)}
        knows[module] = {t for t in targets if t in files and t != module and t != ("prunekern",)}
        # A room's __init__ is imported along with a file of it, but does not make the file know the room.
        knows[module] -= {module[:i] for i in range(1, len(module))}

    def walk(module, path) -> list | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(knows[module]):
            circle = walk(other, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    done: set = set()
    for module in sorted(knows):
        circle = walk(module, [])
        assert circle is None, " > ".join(".".join(m) for m in circle)


def test_nobody_imports_a_private_name():
    """Of another file: neither `from x import _y`, nor `x._y` of an imported module, nor a private module of a room."""
    wrong = []
    roots = [PACKAGE, ROOT / "tests", ROOT / "bench"]
    for file in sorted(f for root in roots for f in root.rglob("*.py")):
        ours, where = imports(file), file.relative_to(ROOT)
        own_room = module_of(file)[:-1]
        modules = set()
        for module, name, line in ours:
            if name.startswith("_") and not name.startswith("__") and name not in FRONT:
                wrong.append(f"{where}:{line}: {name} of {'.'.join(module)}")
            private = [part for part in module[1:] if part.startswith("_") and part not in FRONT]
            if private and module[: len(own_room)] != own_room:
                wrong.append(f"{where}:{line}: {'.'.join(module)}")
            is_module = (ROOT.joinpath(*module, name)).is_dir() or ROOT.joinpath(*module, f"{name}.py").is_file()
            if name and is_module:
                modules.add(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                if node.attr.startswith("_") and not node.attr.startswith("__") and node.attr != "_C":
                    wrong.append(f"{where}:{node.lineno}: {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_lower_rooms_know_torch_only():
    wrong = []
    for room in ("kernels", "ops", "nn"):
        for file in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                wrong += [f"{file.relative_to(ROOT)}: {n}" for n in names if n.split(".")[0] in ABOVE_TORCH]
    assert not wrong, "\n".join(wrong)


def test_top_level_holds_the_front_door_only():
    allowed = {"__init__.py", "__main__.py", "_native.py", "_moved.py", "hf.py"}
    assert {file.name for file in PACKAGE.glob("*.py")} <= allowed
