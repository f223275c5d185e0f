"""What killed writers leave is cleared by the next, whatever killed them; what a living one writes is not."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from prunekern.storage import folders, working
from prunekern.storage.folders import replacing
from tests.helpers.compact_folders import ROOT
from tests.helpers.on_disk import content, litter

WRITER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from prunekern.storage import folders, working
from prunekern.storage.folders import replacing
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
{patch}
with replacing(Path(sys.argv[1]), lambda name: name == "a") as folder:
    (folder / "a").write_text("new")
    {inside}
"""


def start(path, inside="pass", patch=""):
    code = WRITER.format(root=ROOT, patch=patch, inside=inside)
    return subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, stdin=subprocess.PIPE)


def save(path, text="next"):
    with replacing(path, lambda name: name == "a") as folder:
        (folder / "a").write_text(text)


@pytest.fixture
def target(tmp_path):
    save(tmp_path / "m", "old")
    (tmp_path / "m" / "own").write_text("own")
    return tmp_path / "m"


NO_EXCHANGE = "folders._exchange = lambda a, b: False\n"
MOMENTS = {
    "before the lock": ("", "os.open = die"),
    "before it is held": ("", "working._try_lock = die"),
    "while writing": ("die()", ""),
    "before the exchange": ("", "folders._put = die"),
    "after the exchange": ("", "put = folders._put\nfolders._put = lambda *a: (put(*a), die())"),
    "while clearing": ("", "working.shutil.rmtree = die"),
    "before the lock goes": ("", "Path.unlink = die"),
    "after the lock went": ("", "Path.rmdir = die"),
    "set aside": ("", NO_EXCHANGE + "rename = os.rename\nos.rename = lambda a, b: (rename(a, b), die())"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment(target, moment):
    inside, patch = MOMENTS[moment]
    killed = start(target, inside, patch)
    assert killed.wait(30) == -signal.SIGKILL
    assert litter(target.parent), "nothing was left: the kill came too late"
    if target.exists():
        assert content(target)["a"] in (b"old", b"new")
    working.clear_left(target)  # as the next save begins
    assert not litter(target.parent)
    assert content(target)["a"] in (b"old", b"new") and content(target)["own"] == b"own"
    save(target)
    assert content(target) == {"a": b"next", "own": b"own"} and not litter(target.parent)


def test_a_living_writer_keeps_its_folder(target):
    """Of another process, whatever its number; and a child that it forked says nothing about it."""
    writer = start(target, "print(flush=True); sys.stdin.readline()")
    writer.stdout.readline()
    held = litter(target.parent)
    assert len(held) == 1
    for age in (0, 10 * working.STALE_SECONDS):  # however long it takes
        for folder, _, files in os.walk(target.parent / held[0]):
            for name in (folder, *(os.path.join(folder, file) for file in files)):
                os.utime(name, (time.time() - age,) * 2)
        save(target)
        assert litter(target.parent) == held
    writer.communicate(b"\n", 30)
    assert writer.returncode == 0 and not litter(target.parent)
    assert content(target) == {"a": b"new", "own": b"own"}


def test_threads_that_save_at_once(target):
    """Two to one folder, two to others beside it; the umask, which is the process's, is as it was."""
    before, errors = os.umask(0o027), []
    paths = [target, target, target.with_name("m.x"), target.with_name("m.x.writing-y")]

    def work(path):
        try:
            for n in range(40):
                save(path, str(n))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert os.umask(before) == 0o027
    assert not errors and not litter(target.parent)
    for path in paths:
        assert content(path)["a"] == b"39" and (path / "a").stat().st_mode & 0o777 == 0o640
        assert path.stat().st_mode & 0o777 == 0o750
    assert content(target)["own"] == b"own"


def test_another_machines_is_left_for_a_day(target, monkeypatch):
    """A disk of several machines whose locks are not seen by each other: held or not, a lock says nothing."""
    monkeypatch.setattr(working, "_machine", lambda: b"another")
    monkeypatch.setattr(working, "_remove", lambda *args: None)
    save(target)
    monkeypatch.undo()
    (hidden,) = litter(target.parent)
    save(target)
    assert litter(target.parent) == [hidden]
    for path in (target.parent / hidden, *(target.parent / hidden).rglob("*")):
        os.utime(path, (time.time() - working.STALE_SECONDS - 60,) * 2)
    save(target)
    assert not litter(target.parent)


def test_a_disk_without_locks(target, monkeypatch):
    """Nobody can hold anything there: saving works, and what is young stays."""

    def no_locks(*args):
        raise OSError("No locks available")

    monkeypatch.setattr(working.fcntl, "flock", no_locks)
    with replacing(target, lambda name: name == "a") as folder:
        (folder / "a").write_text("outer")
        save(target, "inner")
        assert len(litter(target.parent)) == 1
    assert content(target)["a"] == b"outer" and not litter(target.parent)


def test_folders_that_are_not_ours_stay(target):
    """Hidden ones of the same beginning: what earlier versions left, a user's own, another target's, a link."""
    parent = target.parent
    for name in (".m.settings", ".m.x1y2z3w4", ".mm.writing-12345678", ".m.writing-mine"):
        (parent / name).mkdir()
        (parent / name / "kept").write_text("mine")
    (parent / ".m.writing-link").symlink_to(parent / ".m.settings")
    before = content(parent), litter(parent)
    save(target, "old")
    assert (content(parent), litter(parent)) == before


def test_a_full_disk_at_the_lock(target, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(working.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save(target)
    monkeypatch.undo()
    assert content(target) == {"a": b"old", "own": b"own"} and not litter(target.parent)


def test_the_only_copy_is_never_removed(target, monkeypatch):
    """Without an atomic exchange the old folder steps aside; where it cannot go back at once, it does later."""
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save(target)
    assert not target.exists()
    monkeypatch.undo()
    save(target)
    assert content(target) == {"a": b"next", "own": b"own"} and not litter(target.parent)
