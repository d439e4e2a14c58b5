"""Data sets with their token ids on disk: tokenised once, read by every run that has the same texts and tokenizer.

`{cache_dir}/tokens/KEY/` holds the examples, a line of JSON each, and the ids of their texts; KEY is a digest of all
that decides about them. `{cache_dir}/tokens/given/KEY.json` says which of these folders holds what some files gave
last time, so that they need not even be parsed again. All of it may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

import numpy as np

from encoder import Encoder, bare
from feedback import Dataset, Example, Markers, unpack
from records import Bytes
from utils import REPOSITORY, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096  # examples that are tokenised together
READERS = ("corpora.py", "dataloader.py", "feedback.py", "records.py", "shapes.py", "sources.py", "utils.py")
SMALL = 4_000_000  # bytes of a data set that is tokenised again each time, which takes a second or so
CODE = ("feedback.py", "groups.py", "encoder.py", "token_store.py")  # what decides about the ids of a text
ABANDONED = 24 * 3600  # seconds after which a folder that nobody has finished is deleted


class TokenStore(Sequence[Example]):
    """The examples of a data set, and their ids, read from a folder as they are asked for."""

    key: str | None

    def __init__(self, folder: Path) -> None:
        """Errors: `ValueError` or `OSError` where a file is missing or not as it was written."""
        about = json.loads((folder / "about.json").read_text())
        if about.pop("digest", None) != digest_json(about):
            raise ValueError("about.json is not what was written")
        for name, said in about["files"].items():
            if described(folder / name) != said:
                raise ValueError(f"{name} is not what was written")
        # Where each example's line begins, which of the texts its prompt is (its generations follow), and where the
        # ids of each text begin; all with an end.
        self.lines, self.texts, self.places = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("lines", "texts", "places"))
        self.examples, self.ids = Bytes(folder / "examples.jsonl"), Bytes(folder / "ids.bin")
        self.dtype, self.content = np.dtype(about["dtype"]), str(about["content"])
        self.kept, self.key = True, folder.name  # for other runs; what all of this depends on

    def __len__(self) -> int:
        return len(self.lines) - 1

    @overload
    def __getitem__(self, number: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Example]: ...

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        place = number % len(self)
        return unpack(self.examples.read(int(self.lines[place]), int(self.lines[place + 1])))[1]

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def prompt_ids(self, number: int) -> list[int]:
        return self._read(self.texts[number])

    def completion_ids(self, number: int, index: int) -> list[int]:
        """Ids of an example's generation after its prompt, with one EOS at the end. Before any cut."""
        assert 0 <= index < self.generations(number), (number, index)
        return self._read(self.texts[number] + 1 + index)

    def generations(self, numbers: Any) -> Any:
        """How many each of these examples has."""
        return self.texts[numbers + 1] - self.texts[numbers] - 1

    def prompt_lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._lengths(self.texts[numbers])

    def completion_lengths(self, numbers: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self._lengths(self.texts[numbers] + 1 + indices)

    def _lengths(self, texts: np.ndarray) -> np.ndarray:
        return self.places[texts + 1] - self.places[texts]

    def _read(self, text: int) -> list[int]:
        start, end = (int(self.places[place]) * self.dtype.itemsize for place in (text, text + 1))
        return np.frombuffer(self.ids.read(start, end), self.dtype).tolist()


def tokenised(data: Dataset, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> TokenStore:
    """The examples and their ids: from `folder`, where they are or else will be; a small set does without."""
    size, content = digest_of(data)
    key = store_key(content, tokenizer)
    if size >= SMALL and key:
        if (found := opened(folder / key)) is not None:
            return found
        with contextlib.suppress(UnwritableError):
            return built(folder / key, data, tokenizer, content)
    with tempfile.TemporaryDirectory(prefix="halos-") as temporary:
        write(Path(temporary), data, tokenizer, content)
        store = TokenStore(Path(temporary))  # its files are open, and gone when it is
        store.kept, store.key = False, key
        return store


class UnwritableError(Exception):
    """Nothing can be kept there."""


def digest_of(data: Dataset) -> tuple[int, str]:
    """Bytes of a data set, and a digest of its examples and their order."""
    size, digest = 0, hashlib.blake2b(digest_size=20)
    for record in data.records():
        size += len(record)
        digest.update(record)
    return size, digest.hexdigest()


def store_key(content: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """What the ids of these texts depend on, in a word. None: a tokenizer that does not say what it does."""
    import tokenizers
    import transformers

    backend = bare(tokenizer)
    if backend is None:
        return None
    return digest_json([content, backend.to_str(), backend.encode_special_tokens, type(tokenizer).__name__,
                        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"],
                        tokenizers.__version__, transformers.__version__, code_digest(*CODE)])


def digest_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()


def code_digest(*names: str) -> str:
    """Of the repository's own files: what was made by other code is not taken for the same."""
    return digest_json([(REPOSITORY / name).read_text() for name in names])


def opened(folder: Path) -> TokenStore | None:
    if not folder.is_dir():
        return None
    try:
        return TokenStore(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"note: {folder}: damaged ({error}); it is made anew", file=sys.stderr)
        return None


def built(folder: Path, data: Dataset, tokenizer: "PreTrainedTokenizerBase", content: str) -> TokenStore:
    """Made in a folder of its own and moved into place, so that others see all of it or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(folder.parent)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        try:
            write(partial, data, tokenizer, content)
            os.chmod(partial, 0o755)
            made = TokenStore(partial)
            made.key = folder.name
            with contextlib.suppress(FileNotFoundError):
                folder.rename(partial / "replaced")  # a damaged one
            with contextlib.suppress(FileExistsError, OSError):  # another run was faster
                partial.rename(folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
            return made
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        print(f"note: {folder.parent} cannot keep token ids ({error.strerror}): they are made anew each time",
              file=sys.stderr)
        raise UnwritableError from error


def clear_abandoned(folder: Path) -> None:
    for partial in folder.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, data: Dataset, tokenizer: "PreTrainedTokenizerBase", content: str) -> None:
    """The files of a `TokenStore`, a few thousand examples at a time. content: digest of the examples."""
    from tqdm import tqdm

    encoder = Encoder(tokenizer)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    lines, texts, places = (array("q", [0]) for _ in range(3))
    with (open(folder / "examples.jsonl", "wb") as examples, open(folder / "ids.bin", "wb") as file,
          tqdm(total=len(data), desc=f"tokenise {data.name:.40}", unit="ex", disable=None, delay=1) as bar):
        records = data.records()
        while chunk := list(islice(records, CHUNK)):
            several = [unpack(record)[1] for record in chunk]
            encoded = encoder([example.prompt for example in several], [example.generations for example in several])
            flat = list[int]()
            for record, (prompt, completions) in zip(chunk, encoded, strict=True):
                lines.append(lines[-1] + len(record))
                texts.append(texts[-1] + 1 + len(completions))
                for ids in (prompt, *completions):
                    flat += ids
                    places.append(places[-1] + len(ids))
            examples.writelines(chunk)
            np.array(flat, dtype).tofile(file)
            bar.update(len(chunk))
    for name, column in (("lines", lines), ("texts", texts), ("places", places)):
        np.save(folder / f"{name}.npy", np.frombuffer(column, np.int64))
    names = ("examples.jsonl", "ids.bin", "lines.npy", "texts.npy", "places.npy")
    about = {"dtype": dtype.name, "examples": len(data), "data": data.name, "content": content,
             "files": {name: described(folder / name) for name in names}}
    write_json(folder / "about.json", {**about, "digest": digest_json(about)})


def described(file: Path) -> list[Any]:
    """Size and digest of a file."""
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=20)).hexdigest()]


# What files gave last time -------------------------------------------------------------------------------------------

class Given(NamedTuple):
    """What a run's data sets gave: where it is, and what was said about it."""

    content: str  # digest of the examples
    left_out: dict[str, int]
    notes: list[str]


def key_of(names: Sequence[str], files: Sequence[Path], split: str, markers: Markers, seed: int) -> str:
    """files: all that is read for these names."""
    return digest_json([list(names), split, markers, seed, code_digest(*READERS), sys.version,
                        [(file.name, described(file)) for file in files]])


def recalled(folder: Path, key: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[TokenStore, Given] | None:
    """The examples and ids in `folder`, where a run has left them; what was said then is said again."""
    try:
        given = Given(**json.loads((folder / "given" / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    name = store_key(given.content, tokenizer)
    store = opened(folder / name) if name else None
    if store is None:
        return None
    for note in given.notes:
        print(note, file=sys.stderr)
    return store, given


def remember(folder: Path, key: str, given: Given) -> None:
    with contextlib.suppress(OSError):  # what cannot be kept is found out anew
        write_json(folder / "given" / f"{key}.json", given._asdict())
