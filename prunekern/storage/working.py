"""A hidden folder that one writer works in and holds while it lives; what dead writers left is cleared.

A file in it is held locked (`flock`) until the writer is done. The system lets go of a lock when its process ends, in
whatever way, so that a lock which can be had says that the writer is dead: no process number is looked at, which could
be another's by now, or count in another container. Where a network disk is mounted with locks that other machines do
not see (`nolock`, `local_lock`), a lock says nothing about writers elsewhere: what another machine left, or this one
before it was started anew, is cleared when nothing in it has changed for a day.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked, and what is left is cleared by its age
    fcntl = None  # type: ignore[assignment]

NEW, OLD = "new", "old"  # in it: what is being written; what stood at the place where that goes
LOCK = "lock"
STALE_SECONDS = 24 * 3600


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """An empty folder (`NEW`) in a hidden one beside `path`, on the same disk; both go when the block ends.

    What dead writers left for the same `path` is cleared first. A folder that was moved aside to `OLD` goes back to
    `path` where nothing has taken its place.
    """
    clear_left(path)
    hidden, lock = _hold(path)
    try:
        yield hidden / NEW
    finally:
        try:
            _remove(hidden, path)
        finally:
            os.close(lock)


def clear_left(path: Path) -> None:
    """Remove the hidden folders that dead writers of `path` left, and none that a living one holds."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            hidden = path.parent / name
            if name.startswith(_prefix(path)) and hidden.is_dir() and not hidden.is_symlink():
                with suppress(OSError):  # another writer may be clearing it too
                    _clear(hidden, path)


def _prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _hold(path: Path) -> tuple[Path, int]:
    """A hidden folder with `NEW` in it, and the descriptor of its lock."""
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        lock = -1
        try:
            lock = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            locked = _try_lock(lock)
            if locked:
                os.write(lock, _machine())
            if locked is not False and os.path.samestat(os.fstat(lock), os.stat(hidden / LOCK)):
                (hidden / NEW).mkdir()
                return hidden, lock
        except FileNotFoundError:
            pass  # another writer saw it before the lock was held, and cleared it: again
        except BaseException:
            _remove(hidden, path)
            if lock >= 0:
                os.close(lock)
            raise
        if lock >= 0:
            os.close(lock)


def _try_lock(lock: int) -> bool | None:
    """Whether the lock is ours now; False where another holds it, None where this disk knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _machine() -> bytes:
    """The same for everything that runs on this kernel, in whatever container, until it is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return platform.node().encode()


def _clear(hidden: Path, path: Path) -> None:
    """Remove one hidden folder, if its writer is dead."""
    try:
        lock = os.open(hidden / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        hidden.rmdir()  # killed before there was a lock, or after: then it is empty. A living writer takes another
        return
    try:
        locked = _try_lock(lock)
        ours = locked and os.read(lock, 100) == _machine()
        newborn = locked and not any((hidden / name).exists() for name in (NEW, OLD))
        if locked is not False and (ours or newborn or _age(hidden) > STALE_SECONDS):
            _remove(hidden, path)
    finally:
        os.close(lock)


def _age(hidden: Path) -> float:
    """Seconds since anything in it changed."""
    return time.time() - max(p.lstat().st_mtime for p in (hidden, *hidden.rglob("*")))


def _remove(hidden: Path, path: Path) -> None:
    """The lock goes last: a kill here leaves what can still be told from a living writer's."""
    with suppress(OSError):
        if (hidden / OLD).is_dir() and not path.exists():
            os.rename(hidden / OLD, path)
        for name in (NEW, OLD):
            shutil.rmtree(hidden / name, ignore_errors=True)
        if not any((hidden / name).exists() for name in (NEW, OLD)):
            (hidden / LOCK).unlink(missing_ok=True)
            hidden.rmdir()
