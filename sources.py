"""Rows of a data set, from the Hub or from files, with the place of each for the message about a broken one.

A file is JSON (a list of rows), JSON Lines, either of them gzipped, or Parquet. A folder holds one per split,
`train.*` and `test.*`. Reading draws on no random state.
"""

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils import UserError

Row = dict[str, Any]
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLIT_FILES = {"train": ("train",), "test": ("test", "validation", "eval")}
HELD_OUT = 0.1  # share of the prompts of a file without splits that the test split gets


def is_path(name: str) -> bool:
    """Whether `name` means a file or a folder, not a function of dataloader.py nor a set on the Hub."""
    return name.endswith(ENDINGS) or name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def read_rows(source: str, split: str, *, data_dir: str | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) for every row of `split` ('train' or 'test'): of a file or folder here, else of the Hub.

    place: `file:line`, for messages. Errors: `UserError` for a source that cannot be had or read.
    """
    path = Path(source).expanduser()
    if not is_path(source):
        yield from _hub_rows(source, split, data_dir)
    elif path.is_dir():
        yield from _file_rows(_split_file(path, split))
    elif path.is_file():
        yield from _rows_of_split(path, list(_file_rows(path)), split)
    else:
        raise UserError(f"datasets: no file or folder {path}")


def _hub_rows(name: str, split: str, data_dir: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, data_dir=data_dir)
    except Exception as error:  # the library raises a dozen kinds; each means that these rows cannot be had
        raise UserError(f"datasets: {name} cannot be loaded from the Hub ({type(error).__name__}: "
                        f"{str(error).splitlines()[0] if str(error) else ''}); for a copy on disk write "
                        "NAME:PATH, as in datasets=[hh:data/hh.jsonl.gz]") from None
    for number, row in enumerate(rows):
        yield f"{name}[{split}] row {number}", dict(row)


def _split_file(folder: Path, split: str) -> Path:
    for stem in SPLIT_FILES[split]:
        for ending in ENDINGS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    raise UserError(f"datasets: {folder} has no {split} split; it needs {' or '.join(SPLIT_FILES[split])} with one of "
                    f"{', '.join(ENDINGS)}")


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.name.endswith(ENDINGS):
        raise UserError(f"datasets: {path} is no {', '.join(ENDINGS)} file")
    empty = True
    for place, row in _parquet(path) if path.suffix == ".parquet" else _json(path):
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be an object, got {type(row).__name__}")
        yield place, row
    if empty:
        raise UserError(f"datasets: {path} is empty")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"datasets: {path} is no readable Parquet file ({str(error).splitlines()[0]})") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.lstrip().startswith("[") and ".json" in path.suffixes:  # one array, not a row a line
                    rows = _parsed(line + file.read(), path, number)
                    yield from ((f"{path} row {place}", row) for place, row in enumerate(rows, 1))
                elif line.strip():
                    yield f"{path}:{number}", _parsed(line.rstrip(), path, number, "; a line holds one row")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"datasets: {path} cannot be read ({error})") from None


def _parsed(text: str, path: Path, first_line: int, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{first_line + error.lineno - 1}: no valid JSON ({error.msg} at column {error.colno})"
                        f"{hint}") from None


def _rows_of_split(path: Path, rows: list[tuple[str, Row]], split: str) -> Iterable[tuple[str, Row]]:
    """A `split` column decides; without one a tenth of the prompts, by their hash, is the test split."""
    if any("split" in row for _, row in rows):
        chosen = [(place, row) for place, row in rows if _split_of(place, row) == split]
        if not chosen:
            raise UserError(f"datasets: {path} has no row whose split is {split!r}")
        return chosen
    chosen = [(place, row) for place, row in rows if _is_held_out(row) == (split == "test")]
    print(f"note: {path} has no split column: {len(chosen):,} of {len(rows):,} rows are its {split} split "
          f"({HELD_OUT:.0%} of the prompts, by hash, are held out)", file=sys.stderr)
    return chosen


def _split_of(place: str, row: Row) -> str:
    name = row.get("split")
    for split, spellings in SPLIT_FILES.items():
        if isinstance(name, str) and name.split("_")[0] in spellings:
            return split
    raise UserError(f"{place}: split is {name!r}, allowed are {', '.join(sum(SPLIT_FILES.values(), ()))}")


def _is_held_out(row: Row) -> bool:
    """By the text of the prompt, so that rows of one prompt stay together and neither order nor shape matters."""
    digest = hashlib.sha256(_prompt_text(row).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _prompt_text(row: Row) -> str:
    for key in ("prompt", "messages", "chosen"):
        value = row.get(key)
        if isinstance(value, list):
            turns = value if key == "prompt" else value[:-1]
            return "\n".join(str(turn.get("content") if isinstance(turn, dict) else turn) for turn in turns)
        if value is not None:  # a prompt, or a transcript: all but the last reply
            return str(value) if key == "prompt" else str(value).rpartition("\n\nAssistant:")[0] or str(value)
    return json.dumps(row, sort_keys=True, default=str)
