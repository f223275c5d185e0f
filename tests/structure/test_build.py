"""The build: a wheel without torch, a machine without a compiler, a C++ program without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prunekern

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
BUILD_INPUTS = ("csrc", "prunekern", "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md")


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def copied(copy: Path) -> Path:
    """What the build reads: builds leave files beside their sources."""
    copy.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def sources(tmp_path) -> Path:
    return copied(tmp_path / "sources")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel, and the folder in which CMake built its core: compiled once, for all who want one or the other."""
    folder = tmp_path_factory.mktemp("built")
    sources = copied(folder / "sources")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sources],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = folder.glob(f"prunekern-{prunekern.__version__}-*.whl")
    (cache,) = sources.glob("build/temp.*/**/CMakeCache.txt")
    return wheel, cache.parent


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", "out"],
        cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_torch_is_no_build_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [r for r in project["build-system"]["requires"] if r.startswith("torch")]
    assert [r for r in project["project"]["dependencies"] if r.startswith("torch>=")]


def test_the_version_stands_in_one_place():
    """`__version__`, which setuptools and CMake read as text: pyproject.toml and CMakeLists.txt have no number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "prunekern.__version__"}
    assert "project(prunekern VERSION ${PRUNEKERN_VERSION} " in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.slow
@compiler
def test_wheel_has_the_core_and_the_core_needs_no_torch(built, tmp_path):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert [n for n in names if n.startswith("prunekern/_C")]
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from prunekern import _C; print(_C.isa(), 'torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path / "installed"], capture_output=True, text=True, check=True
    ).stdout.split()
    isas = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
    assert out[0] in isas and out[1] == "False"


@pytest.mark.slow
def test_without_a_compiler_the_package_still_builds(sources, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    for name in ("cmake", "ninja"):
        (empty / name).symlink_to(tool(name))
    result = build(sources, PATH=str(empty), CC="", CXX="")
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("prunekern: ")]
    assert lines == [
        "prunekern: built without its C++ kernels (no C++ compiler found); install a C++17 compiler "
        "(apt-get install g++) and reinstall to get them"
    ]
    assert list((sources / "out").rglob("prunekern/machine/info.py"))
    assert not list((sources / "out").rglob("_C*.so"))


@pytest.mark.slow
@compiler
def test_code_that_does_not_compile_is_no_missing_compiler(sources):
    with open(sources / "csrc/cpu/isa.cpp", "a") as file:
        file.write("this is not C++\n")
    result = build(sources)
    assert result.returncode != 0
    assert "this is not C++" in result.stderr


@pytest.mark.slow
@compiler
def test_a_cpp_program_links_the_installed_library(built, tmp_path):
    """examples/cpp against an install of everything (CTest installs the C++ component only)."""

    def cmake(*arguments: object) -> None:
        result = subprocess.run([tool("cmake"), *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    prefix, ninja = tmp_path / "prefix", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    cmake("--install", built[1], "--prefix", prefix)
    (version,) = prefix.rglob("prunekernConfigVersion.cmake")
    assert f'set(PACKAGE_VERSION "{prunekern.__version__}")' in version.read_text()
    cmake("-S", ROOT / "examples/cpp", "-B", tmp_path / "build", "-G", "Ninja", ninja, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", tmp_path / "build")
    assert "right" in subprocess.check_output([tmp_path / "build/deploy"], text=True)
