"""What a user sees of an error: one line on stderr and an exit status, never where in the code it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

MISTAKE = 2  # what a user can mend: a wrong option, a file that is not there or not what it should be, a full disk
INTERRUPTED = 130  # Ctrl-C, as shells have it

# The extra of pyproject.toml that brings a package.
_EXTRAS = {
    "hf": ("transformers", "datasets", "accelerate", "sklearn", "scipy", "matplotlib"),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript"),
    "eval": ("lm_eval",),
    "peft": ("peft",),
}
# Of what typer raises for options that do not fit; it brings a click of its own.
_USAGE = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def guarded(run: Callable[[], object]) -> None:
    """Call `run`; what it raises ends the process, see `_say`. What it returns is the exit status, where it is one."""
    try:
        status = run()
        sys.stdout.flush()  # a full disk behind it is known here, and not when nobody catches it any more
    except BrokenPipeError:
        _silence()
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        _say(error)
    sys.exit(status if isinstance(status, int) else 0)


def _say(error: Exception) -> NoReturn:
    from ..tasks.sources.fetch import FetchError

    extra = _extra(error) if isinstance(error, ModuleNotFoundError) else None
    if extra is not None:
        text = f"{error.name} is not installed: pip install 'prunekern[{extra}]'"  # type: ignore[attr-defined]
    elif type(error).__name__ == "NoArgsIsHelpError":  # `prunekern` alone
        error.show()  # type: ignore[attr-defined]
        sys.exit(MISTAKE)
    elif isinstance(error, _USAGE):
        text = error.format_message()  # type: ignore[attr-defined]
    elif isinstance(error, (ValueError, OSError, FloatingPointError, FetchError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (prunekern --traceback COMMAND ... says where)"
    if isinstance(error, OSError):
        _silence()  # it may be stdout itself whose disk is full
    print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(MISTAKE)


def _extra(error: ModuleNotFoundError) -> str | None:
    return next((extra for extra, names in _EXTRAS.items() if (error.name or "").split(".")[0] in names), None)


def _silence() -> None:
    """What is still to be written to stdout goes nowhere: the interpreter would complain of it when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def reading(what: object) -> Iterator[None]:
    """ValueError that names the folder, for whatever a library raises over what is in it.

    transformers, tokenizers and safetensors have no error of their own for a folder that is damaged or edited: it is
    a KeyError, a ZeroDivisionError, a RuntimeError or one of theirs, and does not say of what.
    """
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: cannot be read ({type(error).__name__}: {error})") from error
