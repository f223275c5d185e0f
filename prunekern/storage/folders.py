"""A folder replaced as a whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and goes when it does not.

    Files of an old folder that are not `ours` are linked over. NotADirectoryError when `path` is a file.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one: what it points to is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file; expected a folder to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if path.exists():
            for old in path.iterdir():
                if not ours(old.name) and not (folder / old.name).exists():
                    _carry(old, folder / old.name)
        for file in folder.rglob("*"):
            if file.is_file():
                if ours(file.name):
                    file.chmod(0o666 & ~_umask())  # safetensors writes through a private temporary file
                _sync(file)
        _sync(folder)
        _put(folder, path)
        _sync(path.parent)
    finally:
        # What is left at this name is the unfinished folder, or the old one after the exchange.
        shutil.rmtree(folder, ignore_errors=True)


def _carry(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link)
    else:
        _link(old, new)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(folder: Path, path: Path) -> None:
    """`folder` takes the name `path`, an old folder there takes `folder`'s, in the same instant where Linux can."""
    if not path.exists():
        os.rename(folder, path)
        return
    if _exchange(folder, path):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.rename(path, aside)  # rename onto an empty folder replaces it
    try:
        os.rename(folder, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
