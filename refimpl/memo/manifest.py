"""What a database holds: the one small file that a commit replaces, and that all readers believe.

The manifest names every file with the bytes that count and their CRC-32. What lies behind those bytes was written after
the last commit and does not count.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import DatabaseError

NAME = "manifest.json"
FORMAT, VERSION = "memo database", 1
PAGE_BYTES = 4096  # records of maps begin at a multiple of it, so that their pages can be mapped one by one


@dataclass(frozen=True)
class Segment:
    """What one commit added to a file of records.

    Attributes
    ----------
    records : int
        In the file up to the end of the segment.
    crc32 : int
        Of the bytes from the end of the segment before.
    """

    records: int
    crc32: int


@dataclass(frozen=True)
class RecordFile:
    """Records of one shape, one after the other.

    Attributes
    ----------
    file : str
        Name in the folder.
    shape, dtype
        Of one record.
    stride : int
        Bytes from one record to the next.
    segments : tuple of Segment
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    stride: int
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, file: str, shape: tuple[int, ...], dtype: Any, aligned: bool) -> RecordFile:
        """An empty one; `aligned` records begin at a page."""
        size = prod(shape) * np.dtype(dtype).itemsize
        stride = -(-size // PAGE_BYTES) * PAGE_BYTES if aligned else size
        return cls(file, tuple(shape), np.dtype(dtype).name, stride)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record without what is behind it up to the next page."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def count(self) -> int:
        """Committed records."""
        return self.segments[-1].records if self.segments else 0

    @property
    def bytes(self) -> int:
        """Committed bytes of the file."""
        return self.count * self.stride


@dataclass(frozen=True)
class WholeFile:
    """A file that is written once, as a checkpoint."""

    file: str
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """All that is committed.

    Attributes
    ----------
    about : dict
        Of which model, with which settings: given when the database was made, never changed.
    records : dict of RecordFile
    files : dict of WholeFile
    notes : dict
        What was found later, as a profile.
    """

    about: Mapping[str, Any]
    records: Mapping[str, RecordFile] = field(default_factory=dict)
    files: Mapping[str, WholeFile] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON with a CRC-32 of itself."""
        document = {"effref": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({"crc32": _own_crc(document), **document}, indent=1).encode()  # the last byte counts

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises
        ------
        DatabaseError
            If there is none, or it is damaged or of another version.
        """
        path = folder / NAME
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DatabaseError(f"{folder} holds no database of maps: make one with 'effref memo build'") from None
        except OSError as error:
            raise DatabaseError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise damaged(path, "it is not JSON") from error
        if not isinstance(document, dict) or document.get("effref") != FORMAT:
            raise DatabaseError(f"{path} is no manifest of a {FORMAT}: make one with 'effref memo build'")
        if document.get("version") != VERSION:
            raise DatabaseError(f"{path} has version {document.get('version')!r}; {VERSION} can be read: build it anew")
        if document.pop("crc32", None) != _own_crc(document):
            raise damaged(path, "its checksum is wrong")
        try:
            return cls(
                document["about"],
                {name: _record_file(one) for name, one in document["records"].items()},
                {name: WholeFile(**one) for name, one in document["files"].items()},
                document["notes"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, "an entry is missing or of another kind") from error


def _record_file(found: dict[str, Any]) -> RecordFile:
    segments = tuple(Segment(**one) for one in found["segments"])
    return RecordFile(**{**found, "shape": tuple(found["shape"]), "segments": segments})


def _own_crc(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def damaged(path: str | os.PathLike[str], what: str) -> DatabaseError:
    """The error for a file that is not what was committed."""
    return DatabaseError(f"{path} is damaged ({what}): build the database anew")
