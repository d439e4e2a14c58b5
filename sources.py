"""Rows of a data set, from the Hub or from files, with the place of each for the message about a broken one.

A file is JSON (a list of rows), JSON Lines, either of them gzipped, or Parquet. A folder holds one per split,
`train.*` and `test.*`. `hf:org/name` is any set on the Hub. Reading draws on no random state.
"""

import contextlib
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils import UnavailableError, UserError

Row = dict[str, Any]
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLIT_FILES = {"train": ("train",), "test": ("test", "validation", "eval")}
HELD_OUT = 0.1  # share of the prompts of a file without splits that the test split gets
HUB = "hf:"
HUB_OPTIONS = ("config", "split", "test_split", "revision")


NOTES: list[list[str]] = []  # of those who want to know what is said


def note(text: str) -> None:
    """Say something about the data, to the user and to whoever is collecting `notes`."""
    print(text, file=sys.stderr)
    for said in NOTES:
        said.append(text)


@contextlib.contextmanager
def notes() -> Iterator[list[str]]:
    """Context whose list holds what is said meanwhile."""
    said = list[str]()
    NOTES.append(said)
    try:
        yield said
    finally:
        NOTES.pop()


def is_path(name: str) -> bool:
    """Whether `name` means a file or a folder, not a function of dataloader.py nor a set on the Hub."""
    return name.endswith(ENDINGS) or name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def data_files(source: str) -> list[Path]:
    """Every file that may hold rows of this file or folder."""
    path = Path(source).expanduser()
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in inside if file.name.endswith(ENDINGS) and file.is_file()]


def with_options(name: str) -> tuple[str, dict[str, str]]:
    """`hh?fraction=0.1` as ('hh', {'fraction': '0.1'}); further options follow after `&`."""
    source, mark, query = name.partition("?")
    options = dict[str, str]()
    for part in query.split("&") if mark else []:
        key, _, value = part.partition("=")
        if not key or not value or key in options:
            raise UserError(f"datasets: {name!r}: got {part!r} after the '?', allowed is KEY=VALUE, each key once, "
                            "joined by '&', and the whole in quotes: \"datasets=['hh?fraction=0.1']\"")
        options[key] = value
    return source, options


def read_rows(source: str, split: str, *, own_split: str | None = None, data_dir: str | None = None,
              file: str | None = None, whole: bool = False) -> Iterator[tuple[str, Row]]:
    """(place, row) for every row of `split` ('train' or 'test'): of a file or folder here, else of the Hub.

    place: `file:line`, for messages. own_split: what the source itself calls the split. file: the one that holds the
    rows on the Hub, where they come with a loading script. whole: a file that names no splits is all of this one.
    Errors: `UserError` for a source that cannot be had or read.
    """
    path = Path(source).expanduser()
    if not is_path(source):
        rows = _hub_rows(source, own_split or split, data_dir, file)
    elif path.is_dir():
        rows = file_rows(_split_file(path, split, own_split))
    elif path.is_file():
        rows = _rows_of_split(path, split, own_split, whole)
    else:
        raise UserError(f"datasets: no file or folder {path}")
    yield from _watched(rows, source)


def _watched(rows: Iterable[tuple[str, Row]], source: str) -> Iterator[tuple[str, Row]]:
    """The rows, with a bar of progress once that takes a while."""
    from tqdm import tqdm

    with tqdm(rows, desc=f"read {source[-40:]}", unit="row", disable=None, delay=1) as bar:
        yield from bar


def read_hub(name: str, split: str, options: Mapping[str, str]) -> Iterator[tuple[str, Row]]:
    """(place, row) for every row of `split` of any set on the Hub, or in a folder laid out like one.

    options: `config` and `revision`; `split`, the name of its training split, and `test_split`, of the held-out one.
    Where these are not named, they are the only ones whose names say so. Without a held-out split a tenth of the
    prompts of the training split, by their hash, is held out.
    """
    config = {"name": options["config"]} if "config" in options else {}
    revision = {"revision": options["revision"]} if "revision" in options else {}
    parts = _load(name, "a copy on disk is named by its path", **config, **revision)
    own = options.get("split") or _own_split(name, list(parts), "train")
    held_out = options.get("test_split") or _own_split(name, [part for part in parts if part != own], "test")
    for key, part in (("split", own), ("test_split", held_out)):
        if part is not None and part not in parts:
            raise UserError(f"datasets: {HUB}{name}: {key} is {part!r}, allowed are {', '.join(parts)}")
    if own is None or own == held_out:
        raise UserError(f"datasets: {HUB}{name}: {'no training split' if own is None else f'both splits are {own!r}'}; "
                        f"name it, as in '{HUB}{name}?split={next(iter(parts))}' (has {', '.join(parts)})")
    part = held_out if split == "test" and held_out else own
    rows = ((f"{HUB}{name}[{part}] row {number}", dict(row)) for number, row in enumerate(parts[part]))
    yield from _watched(rows if held_out else _without_held_out(f"{HUB}{name} has no test split", rows, split), name)


def _own_split(name: str, parts: list[str], split: str) -> str | None:
    """The one of a source's splits that is `split` by its name, or None."""
    for spelling in SPLIT_FILES[split]:
        if spelling in parts:
            return spelling
    found = [part for part in parts if part.split("_")[0] in SPLIT_FILES[split]]
    if len(found) > 1:
        key = "split" if split == "train" else "test_split"
        raise UserError(f"datasets: {HUB}{name}: which split is the {split} one of {', '.join(found)}? Name it, as in "
                        f"'{HUB}{name}?{key}={found[0]}'")
    return found[0] if found else None


def _hub_rows(name: str, own_split: str, data_dir: str | None, file: str | None) -> Iterator[tuple[str, Row]]:
    hint = "for a copy on disk write NAME:PATH, as in datasets=[hh:data/hh.jsonl.gz]"
    try:
        rows = _load(name, hint, split=own_split, data_dir=data_dir)
    except NoLoadingScript:
        if file is None:
            raise
        rows = _load("json", hint, split="train", data_files=f"hf://datasets/{name}/{file}")
    for number, row in enumerate(rows):
        yield f"{name}[{own_split}] row {number}", dict(row)


class NoLoadingScript(UserError):
    """The set has a loading script, which the `datasets` library no longer runs."""


def _load(path: str, hint: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # the library raises a dozen kinds; each means that these rows cannot be had
        kind = (NoLoadingScript if isinstance(error, RuntimeError) and "script" in str(error)
                else UnavailableError)
        raise kind(f"datasets: {path} cannot be loaded from the Hub ({type(error).__name__}: "
                   f"{str(error).splitlines()[0] if str(error) else ''}); {hint}") from None


def _split_file(folder: Path, split: str, own_split: str | None) -> Path:
    for stem in ([own_split] if own_split else []) + list(SPLIT_FILES[split]):
        for ending in ENDINGS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    raise UserError(f"datasets: {folder} has no {split} split; it needs {' or '.join(SPLIT_FILES[split])} with one of "
                    f"{', '.join(ENDINGS)}")


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
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


def _rows_of_split(path: Path, split: str, own_split: str | None, whole: bool) -> Iterator[tuple[str, Row]]:
    """A `split` column decides; without one a tenth of the prompts, by their hash, is the test split."""
    named = own = False
    for _, row in file_rows(path):  # read twice, since a file may be larger than memory
        named = named or "split" in row
        own = own or (own_split is not None and row.get("split") == own_split)
    rows = file_rows(path)
    if not named:
        yield from rows if whole else _without_held_out(f"{path} has no split column", rows, split)
        return
    empty = True
    for place, row in rows:
        if row.get("split") == own_split if own else _split_of(place, row) == split:
            empty = False
            yield place, row
    if empty:
        raise UserError(f"datasets: {path} has no row whose split is {split!r}")


def _without_held_out(what: str, rows: Iterable[tuple[str, Row]], split: str) -> Iterator[tuple[str, Row]]:
    chosen = total = 0
    for place, row in rows:
        total += 1
        if _is_held_out(row) == (split == "test"):
            chosen += 1
            yield place, row
    note(f"note: {what}: {chosen:,} of {total:,} rows are its {split} split ({HELD_OUT:.0%} of the prompts, by hash, "
         "are held out)")


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
    """What the rows of a prompt share: it, or what SHP, OASST and AlpacaEval have in its place."""
    for key in ("prompt", "messages", "chosen"):
        value = row.get(key)
        if isinstance(value, list):
            turns = value if key == "prompt" else value[:-1]
            return "\n".join(str(turn.get("content") if isinstance(turn, dict) else turn) for turn in turns)
        if value is not None:  # a prompt, or a transcript: all but the last reply
            return str(value) if key == "prompt" else str(value).rpartition("\n\nAssistant:")[0] or str(value)
    own = [str(row[key]) for key in ("history", "message_tree_id", "instruction") if row.get(key) is not None]
    return own[0] if own else json.dumps(row, sort_keys=True, default=str)
