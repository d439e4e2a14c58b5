"""Small pure helpers, importable in milliseconds."""

import ctypes
import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent
MISTAKE = 2  # exit status after a user's mistake, which each rank of a run may find by itself


class UserError(ValueError):
    """A mistake that the user can mend: the entry points print it without a traceback and exit with 2."""


class UnavailableError(UserError):
    """What a run needs is somewhere else, as on the Hub, and cannot be had now; the settings may be right."""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def let_threads_sleep() -> None:
    """Let torch's waiting threads sleep, after spinning for microseconds; to be called before torch is imported.

    On a machine shared with others spinning for longer made an evaluation take twice as long; not at all costs a step
    on an idle one a tenth, since it waits some ten thousand times.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed for what is allocated next, where it is glibc.

    Large tensors would else be pages taken anew from the kernel, each time: a tenth of a training step on a CPU.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return to the system what `keep_freed_memory` keeps: where much more was needed once than ever will be again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as <malloc.h> has them


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write(file)` fill a temporary file beside `path`, flush it to disk, then move it into place.

    A reader, or a run killed half-way, sees the old file or the new one, never a piece.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_writable(key: str, folder: Path) -> None:
    """Find out now whether `folder`, which the setting `key` leads to, can be made and written to later.

    Errors: `UserError`.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".halos-"):
            pass
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written to: {existing}: {error.strerror}") from None


def on_local_disk(file: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether only this machine can write there; a kind of disk that is not known may be one that others share."""
    if not mounts.is_file():  # not Linux
        return True
    kinds = {Path(line.split()[1]): line.split()[2] for line in mounts.read_text().splitlines()}
    return next((kinds[folder] for folder in file.resolve().parents if folder in kinds), "") in LOCAL_DISKS


LOCAL_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay"}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused, not written as invalid JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def whole_characters(text: str) -> str:
    """The text with halves of characters, which JSON can hold and UTF-8 cannot, replaced."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
