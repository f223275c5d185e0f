"""The one place that imports the C++ core, and says why where it is not there."""

from __future__ import annotations

import warnings
from types import ModuleType

_C: ModuleType | None = None
_reason = ""
try:
    # Before torch, `_C` would load the system's OpenMP beside torch's own; after it, both share one.
    import torch  # noqa: F401

    from prunekern import _C as built
except ImportError as error:  # no compiler at install time, or a library of the machine is missing
    _reason = str(error)
else:
    _C = built

_REMEDY = (
    "install a C++17 compiler (apt-get install g++), then prunekern again (from its source: pip install "
    "--force-reinstall --no-deps .)"
)


def available() -> bool:
    """Whether the C++ kernels are there."""
    return _C is not None and _unusable(_C) is None


def why_not() -> str | None:
    """One line: what is missing and how to get it; None where the kernels are there."""
    if _C is not None:
        return _unusable(_C)
    if "_C" in _reason:
        return f"no C++ kernels: prunekern was installed without a compiler; {_REMEDY}"
    return f"no C++ kernels: {_reason}; {_REMEDY}"


def _unusable(built: ModuleType) -> str | None:
    """PRUNEKERN_ISA may ask for what this CPU lacks, or for a name that is none."""
    try:
        built.isa()
    except (RuntimeError, ValueError) as error:
        return f"no C++ kernels: {error}"
    return None


def core() -> ModuleType:
    """The module `prunekern._C`; raises RuntimeError with `why_not()` where it is not there."""
    reason = why_not()
    if _C is None or reason is not None:
        raise RuntimeError(reason)
    return _C


if _C is not None and _unusable(_C) is not None:  # asked for by PRUNEKERN_ISA, so someone expects it
    warnings.warn(f"prunekern: PyTorch is used in place of the C++ kernels: {_unusable(_C)}", stacklevel=2)
