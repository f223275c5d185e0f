"""Tells mkdocstrings where the public names of prunekern live, without importing it.

`prunekern` finds its names when they are first used (`_WHERE`), which static analysis cannot see; and where a file
holds a function of its own name, as `ops/compact_linear.py` does, griffe takes the name for the file.
"""

from __future__ import annotations

import ast
import re

import griffe

# "rank, alpha: of the low-rank update": how our docstrings begin what they say of a parameter or field.
FIELD = re.compile(r"^[A-Za-z_]\w*(, [A-Za-z_]\w*)*: \S")
PACKAGES = ("", "nn", "ops", "tasks")


class PublicNames(griffe.Extension):
    """A griffe extension: aliases for public names, and lists where docstrings have a line for each parameter."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Put what each public name stands for in its place, once all files are read."""
        for path in PACKAGES:
            package = pkg[path] if path else pkg
            found = {name: target for name in exported(package) if (target := target_of(package, name)) is not None}
            for name, target in found.items():
                if name in package.members:
                    package.del_member(name)
                package.set_member(name, griffe.Alias(name, target, parent=package))

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Make lines of parameters a list, so that they are not run together."""
        if obj.docstring is not None:
            obj.docstring.value = listed(escaped(obj.docstring.value))


def exported(package: griffe.Module) -> list[str]:
    """Names of `__all__`, and of `_WHERE` where there is one."""
    names = [str(name).strip("'\"") for name in package.exports or []]
    return [*dict.fromkeys([*names, *where(package)])]


def where(package: griffe.Module) -> dict[str, str]:
    """`_WHERE`: the module of each lazy name, relative to the package; empty where there is none."""
    table = package.members.get("_WHERE")
    if table is None:
        return {}
    return {name: path.removeprefix(f"{package.path}.") for name, path in ast.literal_eval(str(table.value)).items()}


def target_of(package: griffe.Module, name: str) -> griffe.Object | None:
    """What a public name stands for, where griffe does not see it; else None."""
    if name in where(package):
        return package[where(package)[name]][name]
    member = package.members.get(name)
    if member is not None and not member.is_alias and member.is_module and name in member.members:
        return member.members[name]
    return None


def escaped(text: str) -> str:
    """Without links and tags that nobody meant: "[rows][tokens]" is a shape, "<V, BA>" a product."""
    return re.sub(r"(`[^`]*`)|\](?=\[)|<(?=\w)", lambda m: m[1] or {"]": "]\\", "<": "&lt;"}[m[0]], text)


def listed(text: str) -> str:
    """Markdown of a docstring: lines like "rank: of the update" become items of a list."""
    if re.search(r"^(Args|Attributes):$", text, re.MULTILINE):
        return text
    lines = []
    for line in text.splitlines():
        if FIELD.match(line):
            if lines and lines[-1] and not lines[-1].startswith(("- ", "    ")):
                lines.append("")
            line = f"- {line}"
        elif lines and line and not line.startswith(" ") and lines[-1].startswith(("- ", "    ")) and in_list(lines):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def in_list(lines: list[str]) -> bool:
    """Whether the last paragraph of these lines is an item of a list."""
    for line in reversed(lines):
        if line.startswith("- "):
            return True
        if not line.startswith("    "):
            return False
    return False
