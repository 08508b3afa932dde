"""The attention database: records on disk that one process appends to and any number of others read.

A folder of files of records, which only grow, and a manifest, which a commit replaces in one step:

    append      records go behind the last ones; no reader looks there
    commit      the files are flushed to the disk, then the new manifest takes the place of the old one

Whenever the writer dies, the manifest on disk is that of the last commit, and all that it names is there.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import weakref
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from refimpl.engines.protocol import Array
from refimpl.errors import DatabaseError
from refimpl.memo.manifest import NAME, Manifest, RecordFile, Segment, WholeFile, damaged

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
_BLOCK = 1 << 22  # bytes that are checked at a time


class _Opened:
    """A file opened for reading; it is closed when nothing refers to it any more, or before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DatabaseError(f"cannot read {path} ({error.strerror}): build the database anew") from error
        self.close = weakref.finalize(self, os.close, self.descriptor)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_all(self) -> bytes:
        """Every byte."""
        with open(self.descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def read(self, start: int, count: int) -> bytes:
        """At most `count` bytes; empty at the end."""
        os.lseek(self.descriptor, start, os.SEEK_SET)
        return os.read(self.descriptor, count)


class Records:
    """The committed records of one file, mapped read-only.

    Attributes
    ----------
    layout : RecordFile
    array : array, shape (N, *shape)
        A read-only view of the file; pages are read when they are touched.
    """

    def __init__(self, path: Path, layout: RecordFile) -> None:
        self.path, self.layout = path, layout
        self._file = _Opened(path)
        if self._file.size < layout.bytes:
            raise damaged(path, f"{self._file.size} of {layout.bytes} bytes are there")
        self.array = self._mapped()  # (N, *shape)

    def _mapped(self) -> Array:
        shape, dtype, count = self.layout.shape, np.dtype(self.layout.dtype), self.layout.count
        if not self.layout.bytes:
            return np.empty((count, *shape), dtype)
        pages = mmap.mmap(self.descriptor, self.layout.bytes, access=mmap.ACCESS_READ)
        raw = np.frombuffer(pages, np.uint8).reshape(count, self.layout.stride)
        return raw[:, : self.layout.record_bytes].view(dtype).reshape(count, *shape)  # copies nothing

    @property
    def descriptor(self) -> int:
        """The open file, for mapping."""
        return self._file.descriptor

    def __len__(self) -> int:
        return self.layout.count

    def verify(self) -> None:
        """Raise DatabaseError where the bytes of a commit are not those that it wrote."""
        before = 0
        for segment in self.layout.segments:
            at, end, crc = before * self.layout.stride, segment.records * self.layout.stride, 0
            while at < end:
                block = self._file.read(at, min(end - at, _BLOCK))
                if not block:
                    raise damaged(self.path, "it ends too early")
                at, crc = at + len(block), zlib.crc32(block, crc)
            if crc != segment.crc32:
                raise damaged(self.path, f"wrong checksum of records {before} to {segment.records - 1}")
            before = segment.records

    def close(self) -> None:
        """Close the file; arrays and mappings made of it live on."""
        self._file.close()


class Database:
    """A committed state of a database, opened for reading.

    Later commits of a writer do not change what it shows.

    Parameters
    ----------
    folder : str or Path
    verify : bool, default False
        Compare all bytes with their checksums; sizes are compared always.

    Attributes
    ----------
    about, notes : dict
        See `refimpl.memo.manifest.Manifest`.

    Raises
    ------
    DatabaseError
        If there is no database, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest, self._files = self._committed()
        self.about, self.notes = self.manifest.about, self.manifest.notes
        self._records: dict[str, Records] = {}
        try:
            for name, layout in self.manifest.records.items():
                self._records[name] = Records(self.folder / layout.file, layout)
            for one in self.manifest.files.values():
                size = self._files[one.file].size
                if size != one.bytes:
                    raise damaged(self.folder / one.file, f"{size} of {one.bytes} bytes are there")
            if verify:
                self.verify()
        except BaseException:
            self.close()
            raise

    def _committed(self) -> tuple[Manifest, dict[str, _Opened]]:
        """The manifest and the whole files that it names: opened at once, since a later commit may remove them."""
        while True:
            manifest = Manifest.read(self.folder)
            try:
                return manifest, {one.file: _Opened(self.folder / one.file) for one in manifest.files.values()}
            except DatabaseError:
                if Manifest.read(self.folder) == manifest:
                    raise

    def verify(self) -> None:
        """Compare all bytes with their checksums."""
        for records in self._records.values():
            records.verify()
        for name in self.manifest.files:
            self.file(name)

    def records(self, name: str) -> Records:
        """The records called `name`; DatabaseError where there are none."""
        if name not in self._records:
            raise DatabaseError(f"{self.folder} has no {name}; it holds {', '.join(self._records) or 'nothing'}")
        return self._records[name]

    def file(self, name: str) -> bytes:
        """A whole file, compared with its checksum."""
        if name not in self.manifest.files:
            raise DatabaseError(f"{self.folder} has no {name}; it holds {', '.join(self.manifest.files) or 'no file'}")
        one = self.manifest.files[name]
        data = self._files[one.file].read_all()
        if len(data) != one.bytes or zlib.crc32(data) != one.crc32:
            raise damaged(self.folder / one.file, "its checksum is wrong")
        return data

    def __contains__(self, name: str) -> bool:
        return name in self._records or name in self.manifest.files

    def close(self) -> None:
        """Close all files; arrays and mappings made of them live on."""
        for records in self._records.values():
            records.close()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Writer:
    """The one process that adds to a database.

    Parameters
    ----------
    folder : str or Path
        Of a database that goes on; or an empty or new one, with `about`.
    about : mapping, optional
        What a new database is of; None opens an existing one. Where both are there they must agree.
    durable : bool, default True
        Flush to the disk at each commit. Without it a commit survives the process, but maybe not a power cut.

    Raises
    ------
    DatabaseError
        If another process writes, the folder holds something else or a database about something else, or the disk is
        full: what was committed before stays.
    """

    def __init__(
        self, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None, durable: bool = True
    ) -> None:
        self.folder, self._durable = Path(folder), durable
        self._open: dict[str, BinaryIO] = {}
        self._added: dict[str, tuple[int, int]] = {}  # name -> records and CRC-32 since the last commit
        if about is not None:
            _make(self.folder)
        self._lock = self._locked()
        try:
            self.manifest = self._begun(about)
        except BaseException:
            self._lock.close()
            raise

    def _locked(self) -> BinaryIO:
        try:
            lock = open(self.folder / LOCK, "ab")  # noqa: SIM115  # held until `close`
        except FileNotFoundError:
            raise DatabaseError(f"{self.folder} is no folder of a database: give one that exists") from None
        except OSError as error:
            raise DatabaseError(f"cannot write to {self.folder}: {error.strerror}") from error
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system when the process ends
            except OSError:
                lock.close()
                raise DatabaseError(f"another process is writing to {self.folder}: wait until it has ended") from None
        return lock

    def _begun(self, about: Mapping[str, Any] | None) -> Manifest:
        about = None if about is None else json.loads(json.dumps(about))  # as it is read back
        if about is None or (self.folder / NAME).exists():
            found = Manifest.read(self.folder)
            if about is not None and found.about != about:
                differing = [name for name in {**found.about, **about} if found.about.get(name) != about.get(name)]
                raise DatabaseError(
                    f"{self.folder} is of something else ({', '.join(differing)} differ): name a new one"
                )
            return found
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in (LOCK, f".{NAME}"))
        if others:
            raise DatabaseError(f"{self.folder} is not empty ({others[0]} is there): give a new folder")
        fresh = Manifest(dict(about))
        self._replace(fresh)
        return fresh

    # --- what is added ----------------------------------------------------------------------------------------------

    def append(self, name: str, records: Array, aligned: bool = False) -> None:
        """Write records (n, *shape) behind those called `name`; the first ones decide shape and dtype.

        Raises
        ------
        DatabaseError
            If shape or dtype differ from those before, or the disk is full: nothing of these records is kept then.
        """
        layout = self._layout(name, records, aligned)
        added, crc = self._added.get(name, (0, 0))
        start, written = (layout.count + added) * layout.stride, 0
        padding = bytes(layout.stride - layout.record_bytes)
        file = self._file(layout)
        try:
            file.seek(start)
            for record in records:
                for part in (np.ascontiguousarray(record).reshape(-1).view(np.uint8).data, padding):
                    _write_all(file, part)
                    crc = zlib.crc32(part, crc)
                written += 1
        except OSError as error:
            with suppress(OSError):
                file.truncate(start)
            raise _unwritable(self.folder / layout.file, error) from error
        self._added[name] = added + written, crc

    def _layout(self, name: str, records: Array, aligned: bool) -> RecordFile:
        known = self.manifest.records.get(name)
        if known is None:
            if not re.fullmatch(r"[a-z0-9-]+", name):
                raise DatabaseError(f"records cannot be called '{name}': give lower-case letters, digits and hyphens")
            known = RecordFile.of(f"{name}.records", records.shape[1:], records.dtype, aligned)
            self.manifest = replace(self.manifest, records={**self.manifest.records, name: known})
        if records.shape[1:] != known.shape or records.dtype != np.dtype(known.dtype):
            raise DatabaseError(
                f"records of {name} are {known.dtype} {known.shape}; given are {records.dtype} {records.shape[1:]}"
            )
        return known

    def _file(self, layout: RecordFile) -> BinaryIO:
        """The file, cut to what is committed when it is opened."""
        if layout.file not in self._open:
            path = self.folder / layout.file
            try:
                file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
                self._open[layout.file] = file
                size = os.fstat(file.fileno()).st_size
                if size < layout.bytes:
                    raise damaged(path, f"{size} of {layout.bytes} bytes are there")
                file.truncate(layout.bytes)
            except OSError as error:
                raise _unwritable(path, error) from error
        return self._open[layout.file]

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file; it counts from the next commit on and takes the place of one of the same name."""
        one = WholeFile(f"{name}-{zlib.crc32(data):08x}.bin", len(data), zlib.crc32(data))
        self._write_whole(self.folder / one.file, data)
        self.manifest = replace(self.manifest, files={**self.manifest.files, name: one})

    def note(self, name: str, found: Any) -> None:
        """Keep something small, as JSON, beside the records; it counts from the next commit on."""
        self.manifest = replace(self.manifest, notes={**self.manifest.notes, name: found})

    def forget(self, name: str) -> None:
        """Leave out what was put or noted under this name; it counts until the next commit."""
        known = self.manifest
        files, notes = ({key: one for key, one in kept.items() if key != name} for kept in (known.files, known.notes))
        self.manifest = replace(known, files=files, notes=notes)

    def count(self, name: str) -> int:
        """Records called `name`, committed or not."""
        known = self.manifest.records.get(name)
        return (known.count if known else 0) + self._added.get(name, (0, 0))[0]

    # --- what makes it count ----------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make all that was added count, as one step.

        Raises
        ------
        DatabaseError
            If the disk is full: the commit before stays what readers see.
        """
        records = dict(self.manifest.records)
        for name, (added, crc) in self._added.items():
            layout = records[name]
            segment = Segment(layout.count + added, crc)
            records[name] = replace(layout, segments=(*layout.segments, segment)) if added else layout
        try:
            if self._durable:
                for file in self._open.values():
                    os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        new = replace(self.manifest, records=records)
        self._replace(new)
        self.manifest, self._added = new, {}
        self._sweep()

    def _replace(self, manifest: Manifest) -> None:
        self._write_whole(self.folder / NAME, manifest.to_bytes())

    def _write_whole(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(f".{path.name}")
        try:
            with open(scratch, "wb", buffering=0) as file:
                _write_all(file, data)
                if self._durable:
                    os.fsync(file.fileno())
            os.replace(scratch, path)
            if self._durable:
                _flush_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink()
            raise _unwritable(path, error) from error

    def _sweep(self) -> None:
        """Remove whole files that no manifest names any more; a reader that still needs one has read it."""
        named = {one.file for one in self.manifest.files.values()}
        for path in self.folder.glob("*.bin"):
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Forget what was not committed and let the next writer in."""
        for file in self._open.values():
            file.close()
        self._open, self._added = {}, {}
        self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# --- files ----------------------------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(f"cannot make the folder {folder}: {error.strerror}") from error


def _write_all(file: Any, data: Any) -> None:
    """A full disk may take a part first and refuse the rest at the next call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> DatabaseError:
    return DatabaseError(f"cannot write {path} ({error.strerror or error}); what was committed before is kept")
