"""A folder replaced as a whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .working import OLD, working_folder


@contextmanager
def replacing(path: Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and goes when it does not.

    Files of an old folder that are not `ours` are linked over. What killed writers of `path` left beside it goes (see
    `working`). NotADirectoryError when `path` is a file.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one: what it points to is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file; expected a folder to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(path) as folder:
        # As the system just made it. Asking for the umask means changing it for a moment, for all threads.
        mode = folder.stat().st_mode & 0o666
        yield folder
        if path.exists():
            for old in path.iterdir():
                if not ours(old.name) and not (folder / old.name).exists():
                    _carry(old, folder / old.name)
        for file in folder.rglob("*"):
            if file.is_file():
                if ours(file.name):
                    file.chmod(mode)  # safetensors writes through a private temporary file
                _sync(file)
        _sync(folder)
        _put(folder, path)
        _sync(path.parent)


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(folder: Path, path: Path) -> None:
    """`folder` takes the name `path`, an old folder there takes `folder`'s, in the same instant where Linux can."""
    if not path.exists():
        try:
            os.rename(folder, path)
            return
        except OSError as error:  # another writer was first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if _exchange(folder, path):
        return
    aside = folder.with_name(OLD)
    os.rename(path, aside)
    try:
        os.rename(folder, path)
    except OSError:
        os.rename(aside, path)
        raise


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
