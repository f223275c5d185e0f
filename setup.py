"""Drives CMake; all metadata is in pyproject.toml.

Without a compiler the extension is left out and the package installs as pure Python: every op then runs on its
PyTorch reference, and `prunekern info` says what is missing.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds prunekern._C with CMake and ninja."""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        try:
            cmake, ninja = _tool("cmake"), _tool("ninja")
            # An isolated build leaves paths of its deleted environment in the cache: name the tools every time.
            self._run(
                [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                 "-DCMAKE_BUILD_TYPE=Release", "-DPRUNEKERN_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={_pybind11_dir()}"]
            )  # fmt: skip
            self._run([cmake, "--build", str(build), "--target", "_C"])
        except _CannotBuild as error:
            print(
                f"prunekern: built without its C++ kernels ({error}); install a C++17 compiler "
                "(apt-get install g++) and reinstall to get them",
                file=sys.stderr,
            )
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C*.so")), out)

    def copy_extensions_to_source(self):
        """Editable installs: tolerates an extension that was not built."""
        if all(Path(self.get_ext_fullpath(ext.name)).exists() or self._built(ext) for ext in self.extensions):
            super().copy_extensions_to_source()

    def _built(self, ext):
        return (Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))).exists()

    @staticmethod
    def _run(command):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode == 0:
            return
        log = result.stdout
        if "No CMAKE_CXX_COMPILER" in log or "CMAKE_CXX_COMPILER not set" in log:
            raise _CannotBuild("no C++ compiler found")
        # A compiler that is there and fails is a bug worth seeing, not a reason to install something slower.
        sys.stderr.write(log)
        raise RuntimeError(f"{Path(command[0]).name} failed with exit status {result.returncode}; its output is above")


class _CannotBuild(Exception):
    """A tool is missing: the pure-Python package can still be installed."""


def _tool(name):
    """The CMake or ninja of this environment's wheel, else the system's."""
    beside = Path(sys.executable).parent / name
    path = shutil.which(name) or (str(beside) if beside.exists() else None)
    if path is None:
        raise _CannotBuild(f"no {name} found")
    return path


def _pybind11_dir():
    try:
        import pybind11
    except ImportError as error:
        raise _CannotBuild("no pybind11 found") from error
    return pybind11.get_cmake_dir()


setup(
    ext_modules=[Extension("prunekern._C", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild},
)
