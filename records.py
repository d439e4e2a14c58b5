"""Bytes on disk that are read piece by piece: what is not looked at takes no memory.

Pieces are read, not mapped: the pages of a mapped file count as resident, and after an epoch all of them would be.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex, overload


class Bytes:
    """A file whose bytes are read by place. It may be deleted once it is open."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.fd, end - start, start)


class Records(Sequence[bytes]):
    """Byte strings by number in a temporary file (in TMPDIR); they are added, and may be exchanged."""

    def __init__(self) -> None:
        handle, path = tempfile.mkstemp(prefix="halos-")
        os.unlink(path)  # so that it is gone with the process, however that ends
        self.fd, self.size = handle, 0
        self.starts, self.ends = array("q"), array("q")
        weakref.finalize(self, os.close, handle)

    def __len__(self) -> int:
        return len(self.starts)

    def append(self, record: bytes) -> int:
        """Add a record; its number is returned."""
        self.starts.append(0)
        self.ends.append(0)
        self[len(self) - 1] = record
        return len(self) - 1

    def __setitem__(self, number: int, record: bytes) -> None:
        written = 0
        while written < len(record):
            written += os.pwrite(self.fd, record[written:], self.size + written)
        self.starts[number], self.ends[number] = self.size, self.size + written
        self.size += written

    @overload
    def __getitem__(self, number: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[bytes]: ...

    def __getitem__(self, number: SupportsIndex | slice) -> bytes | Sequence[bytes]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        start = self.starts[number]
        return os.pread(self.fd, self.ends[number] - start, start)
