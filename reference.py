"""A frozen reference's token log-probs, scored once and read from disk from then on.

One sqlite file in cache_dir serves every run, several at once. What an entry is found by is a digest of all that its
value depends on: see `fingerprint`, and the ids of prompt and completion. So a sweep over losses and their settings
pays for the reference once, and trains without a second model in memory.
"""

import contextlib
import hashlib
import itertools
import json
import sqlite3
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groups import Group, Ids
from loop import Progress
from models import token_budget
from policy import DTYPES, Found, Policy
from sequences import cut_into_microbatches
from utils import UserError, require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dataloader import DataLoader

FILE = "reference.sqlite"
SCORING = 1  # to be raised when models.py or sequences.py score otherwise than before: what is cached is then not found
CHUNK = 1024  # groups that are looked up, sorted by length and scored together
SHARED = 4  # completions, at most, that are scored in one row
CHECKED = 4  # entries of an earlier run that are scored again
PATIENCE = 60  # seconds to wait while another run writes
# How far, as part of a completion's log-probs, the same model may be off when it computes in rows of other company.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
IRRELEVANT = ("_name_or_path", "dtype")  # of a model's config: where it came from, and what it was stored in there

Text = tuple[Ids, Ids]  # ids of a prompt, and of a completion after it


class CachedReference:
    """Token log-probs of a frozen reference, read from disk."""

    def __init__(self, reference: Policy, folder: Path) -> None:
        """Errors: `UserError` where the folder cannot be written to, or the file in it is no such cache."""
        require_writable("cache_dir", folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.device = folder / FILE, reference.device
        with self._explained():
            self.database = sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None)
        with closed_on_error(self):
            self._prepare()
            self.fingerprint = fingerprint(reference)

    def _prepare(self) -> None:
        with self._explained():
            # Readers need not wait for a writer; where the disk cannot do that, they do.
            with contextlib.suppress(sqlite3.OperationalError):  # whatever else it is comes back below
                self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            with self._writing():
                self.database.execute("CREATE TABLE IF NOT EXISTS token_logps (key BLOB PRIMARY KEY, dtype TEXT, "
                                      "tokens INTEGER, crc INTEGER, logps BLOB)")
            self.database.execute("SELECT key, dtype, tokens, crc, logps FROM token_logps LIMIT 1").fetchone()

    def scored(self, batch: Sequence[Group], roles: Sequence[str]) -> Found:
        """What `policy.score` gives for `token_logps` of the batch's completions of `roles`.

        Errors: `UserError` where one is not there, or is damaged.
        """
        items = [(number, role) for number, group in enumerate(batch) for role in roles if role in group.completions]
        values = []
        for number, role in items:
            found = self.read(batch[number].prompt, batch[number].completions[role])
            if found is None:
                raise UserError(f"{self.file}: no reference log-probs of the batch's example {number + 1}, {role}: the "
                                "data is not what they were scored for at the start, or the file was exchanged since; "
                                "start the run again")
            values.append(found)
        lengths = list(map(len, values))
        return {"token_logps": dict(zip(items, torch.cat(values).to(self.device).split(lengths), strict=True))
                if values else {}}

    def key(self, prompt: Ids, ids: Ids) -> bytes:
        """16 bytes that stand for this reference, this prompt and this completion."""
        lengths = array("q", (len(prompt), len(ids)))
        text = lengths.tobytes() + array("i", prompt).tobytes() + array("i", ids).tobytes()
        return hashlib.blake2b(text, digest_size=16, key=self.fingerprint).digest()

    def holds(self, key: bytes) -> bool:
        with self._explained():
            found = self.database.execute("SELECT 1 FROM token_logps WHERE key = ?", (key,))
            return found.fetchone() is not None

    def read(self, prompt: Ids, ids: Ids) -> Tensor | None:
        """(T,), or None where it is not there."""
        key = self.key(prompt, ids)
        with self._explained():
            row = self.database.execute("SELECT dtype, tokens, crc, logps FROM token_logps WHERE key = ?",
                                        (key,)).fetchone()
        if row is None:
            return None
        dtype, tokens, crc, logps = row
        if dtype not in DTYPES or not isinstance(logps, bytes) or crc != checksum(key, dtype, logps):
            raise self._refused("an entry differs from its checksum")
        values = torch.frombuffer(bytearray(logps), dtype=DTYPES[dtype])
        if not len(values) == tokens == len(ids):
            raise self._refused(f"an entry has log-probs of {len(values)} tokens, counts {tokens}, and belongs to a "
                                f"completion of {len(ids)}")
        return values

    def write(self, entries: Iterable[tuple[Text, Tensor]]) -> None:
        """Add (T,) tensors, at once or not at all; what another run has added meanwhile stays."""
        rows = []
        for (prompt, ids), values in entries:
            if not values.isfinite().all():
                raise UserError(f"model: the reference's log-probs are not finite after a prompt of {len(prompt)} "
                                f"ids, for a completion of {len(ids)}; mend its weights, or set another "
                                "model.policy_dtype")
            key, dtype, logps = self.key(prompt, ids), dtype_name(values.dtype), values.numpy().tobytes()
            rows.append((key, dtype, len(values), checksum(key, dtype, logps), logps))
        with self._explained(), self._writing():
            self.database.executemany("INSERT OR IGNORE INTO token_logps VALUES (?, ?, ?, ?, ?)", rows)

    def check(self, texts: Sequence[Text], reference: Policy, budget: int, share: bool) -> None:
        """Score again what was there before this run. Errors: `UserError` where that differs."""
        tolerance = TOLERANCES[reference.dtype]
        for text, value in itertools.chain.from_iterable(live(reference, texts, budget, share)):
            cached = self.read(*text)
            assert cached is not None, "only what it holds is checked"
            error, scale = (cached - value).norm().item(), 1 + value.norm().item()
            if not error <= tolerance * scale:
                raise self._refused(f"an entry is off by {error / scale:.2g} of what this very model gives now (up to "
                                    f"{tolerance:g} is rounding)")

    def close(self) -> None:
        self.database.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # IMMEDIATE: the lock is waited for. A transaction that begins with reading is refused it where another writes.
        self.database.execute("BEGIN IMMEDIATE")
        with self.database:
            yield

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Context in which what sqlite complains about becomes a `UserError`."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", None)
            if code is None:  # our own mistake
                raise
            if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise UserError(f"{self.file}: other runs kept it locked for {PATIENCE} seconds; end one that hangs, "
                                "and start again: what is in it is not scored again") from None
            if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR")):
                raise self._refused(f"no cache of a reference's log-probs, or damaged ({error})") from None
            raise UserError(f"cache_dir: {self.file} cannot be read or written: {error}; make room, or give another "
                            "cache_dir; what is in it is not scored again") from None

    def _refused(self, why: str) -> UserError:
        return UserError(f"{self.file}: {why}; delete it: the next run scores anew what it needs")


@contextlib.contextmanager
def closed_on_error(cache: CachedReference) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cache.close()
        raise


def checksum(key: bytes, dtype: str, logps: bytes) -> int:
    """Of an entry with its key, so that a value in another's place shows."""
    return zlib.crc32(logps, zlib.crc32(key + dtype.encode()))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What a value depends on --------------------------------------------------------------------------------------------

def fingerprint(reference: Policy) -> bytes:
    """32 bytes that stand for the model as it computes: its weights as they are, and what they are computed with.

    Not for how completions are packed: that changes values by rounding only. It reads every weight, from a GPU a
    parameter at a time: a second for each 1.5 GB (with a processor's SHA instructions), so ten for 7B in bfloat16.
    """
    import transformers

    lm = reference.lm
    settings = {name: value for name, value in lm.config.to_dict().items() if name not in IRRELEVANT}
    computed_with = [SCORING, type(lm).__name__, lm.config._attn_implementation, dtype_name(reference.dtype),
                     reference.device.type, torch.__version__, transformers.__version__, settings]
    digest = hashlib.sha256(json.dumps(computed_with, sort_keys=True, default=str).encode())
    for name, tensor in itertools.chain(lm.named_parameters(), lm.named_buffers()):
        digest.update(f"\n{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        raw: Any = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
        digest.update(raw)
    return digest.digest()


# Filling ------------------------------------------------------------------------------------------------------------

def fill_cache(reference: Policy, batches: Iterable[Sequence[Group]], total: int, roles: Sequence[str], folder: Path, *,
               budget: int, share: bool) -> CachedReference:
    """The cache in `folder`, with all that `scored` may be asked about the batches, which have `total` groups.

    What it lacks is scored and written a microbatch at a time, so that a fill that was killed goes on where it was.
    Of what it holds, the model scores the first `CHECKED` again. Errors: `UserError` where these differ.
    """
    cache = CachedReference(reference, folder)
    groups, seen, checked = itertools.chain.from_iterable(batches), 0, 0
    bar, skipped = None, 0  # groups before the first that lacks something
    with closed_on_error(cache), contextlib.ExitStack() as stack:
        while chunk := list(itertools.islice(groups, CHUNK)):
            there, lacking = sorted_out(cache, chunk, roles)
            cache.check(again := there[:CHECKED - checked], reference, budget, share)
            checked += len(again)
            if lacking and bar is None:
                bar, skipped = stack.enter_context(Progress("reference", total - seen)), seen
            scored = 0
            for entries in live(reference, lacking, budget, share):
                cache.write(entries)
                scored += len(entries)
                if bar is not None:
                    bar.advance(seen + len(chunk) * scored // len(lacking) - skipped - bar.done, {})
            seen += len(chunk)
            if bar is not None:
                bar.advance(seen - skipped - bar.done, {})
    return cache


def sorted_out(cache: CachedReference, groups: Iterable[Group], roles: Sequence[str]) -> tuple[list[Text], list[Text]]:
    """The groups' different texts of these roles, in order: those that the cache holds, and those that it lacks."""
    texts = {cache.key(group.prompt, group.completions[role]): (group.prompt, group.completions[role])
             for group in groups for role in roles if role in group.completions}
    held = {key for key in texts if cache.holds(key)}
    return ([text for key, text in texts.items() if key in held],
            [text for key, text in texts.items() if key not in held])


@torch.no_grad()
def live(reference: Policy, texts: Iterable[Text], budget: int, share: bool) -> Iterator[list[tuple[Text, Tensor]]]:
    """The texts, a microbatch at a time, with the (T,) log-probs of each, on the CPU."""
    groups = gathered(texts, SHARED if share else 1, budget)
    for rows in cut_into_microbatches(groups, list(map(str, range(SHARED))), budget, share=share,
                                      window=reference.window):
        values = reference(rows)["token_logps"].cpu().split(rows.lengths)
        yield list(zip(rows.texts, values, strict=True))


def gathered(texts: Iterable[Text], most: int, budget: int) -> list[Group]:
    """The texts as groups: completions of one prompt together, up to `most` and as many ids as the budget has."""
    groups, latest = list[Group](), dict[tuple[int, ...], dict[str, Ids]]()
    for prompt, ids in texts:
        together = latest.get(tuple(prompt))
        if together is None or len(together) == most or sum(map(len, (prompt, ids, *together.values()))) > budget:
            together = latest[tuple(prompt)] = {}
            groups.append(Group(prompt, together, len(groups)))
        together[str(len(together))] = ids
    return groups


def prepare_reference(config: "DictConfig", reference: Policy | None, roles: Sequence[str],
                      loaders: Sequence["DataLoader"], share: bool) -> "Policy | CachedReference | None":
    """The reference as training asks it: read from the cache, or live where the settings say so or it moves."""
    if reference is None or config.reference == "live" or not roles or config.loss.sync_reference_every:
        return reference
    return fill_cache(reference, itertools.chain(*loaders), sum(map(len, loaders)), roles,
                      Path(config.cache_dir).expanduser(), budget=token_budget(config), share=share)
