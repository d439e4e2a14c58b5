"""A frozen reference's token log-probs, scored once and read from disk from then on.

One sqlite file in cache_dir serves every run, several at once. What an entry is found by is a digest of all that its
value depends on: see `fingerprint`, and the ids of prompt and completion. So a sweep over losses and their settings
pays for the reference once, and trains without a second model in memory.
"""

import contextlib
import hashlib
import itertools
import json
import math
import sqlite3
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from budget import token_budget
from groups import Group, Ids
from loop import Progress
from models import compute_dtype, make_reference
from policy import DTYPES, Found, Policy
from sequences import cut_into_microbatches
from utils import REPOSITORY, UserError, require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dataloader import DataLoader

FILE = "reference.sqlite"
SCORING = 1  # to be raised when policy.py scores otherwise than before: what is cached is then not found
CHUNK = 1024  # groups that are looked up together
KEYS = 512  # of one query; sqlite takes 999 at least
HELD = 2**19  # texts, about, that are to be scored and are in memory at a time: 0.5 kB each
WINDOW = 4096  # groups, sorted by length, that are cut into microbatches together
SHARED = 4  # completions, at most, that are scored in one row
CHECKED = 4  # entries that are scored again when the code that scores has changed
PATIENCE = 60  # seconds to wait while another run writes
# How far, as part of a completion's log-probs, the same model may be off when it computes in rows of other company.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
IRRELEVANT = ("_name_or_path", "dtype")  # of a model's config: where it came from, and what it was stored in there

Text = tuple[Ids, Ids]  # ids of a prompt, and of a completion after it


class Entry(NamedTuple):
    origin: int  # under which `surroundings` it was scored
    dtype: str
    logps: bytes


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
            self.fingerprint, self.origin = fingerprint(reference), surroundings(reference.device)

    def _prepare(self) -> None:
        with self._explained():
            # Readers need not wait for a writer; where the disk cannot do that, they do.
            with contextlib.suppress(sqlite3.OperationalError):  # whatever else it is comes back below
                self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            with self._writing():
                self.database.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, origin INTEGER, "
                                      "dtype TEXT, tokens INTEGER, crc INTEGER, logps BLOB)")
                self.database.execute("CREATE TABLE IF NOT EXISTS marks (key BLOB PRIMARY KEY)")
            self.database.execute("SELECT key, origin, dtype, tokens, crc, logps FROM entries LIMIT 1").fetchone()

    def scored(self, batch: Sequence[Group], roles: Sequence[str]) -> Found:
        """What `policy.score` gives for `token_logps` of the batch's completions of `roles`.

        Errors: `UserError` where one is damaged, or is not there. It is not scored then: there is no model left that
        could, and a loader that gives other texts than it gave at the start is a mistake that should show.
        """
        keys, lengths = dict[tuple[int, str], bytes](), list[int]()
        for number, group in enumerate(batch):
            there = [role for role in roles if role in group.completions]
            completions = [group.completions[role] for role in there]
            keys.update(zip(((number, role) for role in there), self.keys(group.prompt, completions), strict=True))
            lengths += map(len, completions)
        if not keys:
            return {"token_logps": {}}
        found = self.entries(dict(zip(keys.values(), lengths, strict=True)))
        for (number, role), key in keys.items():
            if key not in found:
                self.forget_marks()
                raise UserError(f"{self.file}: no reference log-probs of the batch's example {number + 1}, {role}: the "
                                "data is not what they were scored for at the start, or the file was exchanged since; "
                                "start the run again")
        dtype = found[next(iter(keys.values()))].dtype  # the fingerprint's: all have the same
        values = torch.frombuffer(bytearray().join(found[key].logps for key in keys.values()), dtype=DTYPES[dtype])
        return {"token_logps": dict(zip(keys, values.to(self.device).split(lengths), strict=True))}

    def keys(self, prompt: Ids, completions: Iterable[Ids]) -> list[bytes]:
        """16 bytes for each completion, that stand for this reference, the prompt and the completion."""
        start = hashlib.blake2b(array("q", [len(prompt)]).tobytes() + array("i", prompt).tobytes(), digest_size=16,
                                key=self.fingerprint)
        keys = []
        for ids in completions:
            digest = start.copy()
            digest.update(array("i", ids).tobytes())
            keys.append(digest.digest())
        return keys

    def entries(self, lengths: Mapping[bytes, int]) -> dict[bytes, Entry]:
        """Those that are there, each verified. lengths: key -> ids of the completion."""
        found, keys = dict[bytes, Entry](), list(lengths)
        for start in range(0, len(keys), KEYS):
            some = keys[start:start + KEYS]
            with self._explained():
                rows = self.database.execute("SELECT key, origin, dtype, tokens, crc, logps FROM entries WHERE key IN ("
                                             f"{','.join('?' * len(some))})", some).fetchall()
            for key, origin, dtype, tokens, crc, logps in rows:
                if dtype not in DTYPES or not isinstance(logps, bytes) or crc != checksum(key, dtype, logps):
                    raise self.refused("an entry differs from its checksum")
                n = len(logps) // DTYPES[dtype].itemsize
                if not n == tokens == lengths[key]:
                    raise self.refused(f"an entry has log-probs of {n} tokens, counts {tokens}, and belongs to a "
                                        f"completion of {lengths[key]}")
                found[key] = Entry(origin, dtype, logps)
        return found

    def write(self, entries: Sequence[tuple[Text, Tensor]]) -> None:
        """Add (T,) tensors of one dtype, at once or not at all; what another run has added meanwhile stays."""
        values = torch.cat([value for _, value in entries])
        if not values.isfinite().all():
            prompt, ids = next(text for text, value in entries if not value.isfinite().all())
            raise UserError(f"model: the reference's log-probs are not finite after a prompt of {len(prompt)} ids, for "
                            f"a completion of {len(ids)}; mend its weights, or set another model.policy_dtype")
        dtype, raw, rows, start = dtype_name(values.dtype), values.numpy().tobytes(), list[tuple[Any, ...]](), 0
        for (prompt, ids), value in entries:
            (key,), end = self.keys(prompt, [ids]), start + len(value) * values.itemsize
            logps, start = raw[start:end], end
            rows.append((key, self.origin, dtype, len(value), checksum(key, dtype, logps), logps))
        with self._explained(), self._writing():
            self.database.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)

    def is_marked(self, *what: object) -> bool:
        """Whether an earlier run has noted down `what` of this reference: that some data is complete, for instance."""
        with self._explained():
            found = self.database.execute("SELECT 1 FROM marks WHERE key = ?", (self._mark(what),))
            return found.fetchone() is not None

    def mark(self, *what: object) -> None:
        with self._explained(), self._writing():
            self.database.execute("INSERT OR IGNORE INTO marks VALUES (?)", (self._mark(what),))

    def forget_marks(self) -> None:
        with self._explained(), self._writing():
            self.database.execute("DELETE FROM marks")

    def _mark(self, what: tuple[object, ...]) -> bytes:
        return hashlib.blake2b(repr((self.origin, *what)).encode(), digest_size=16, key=self.fingerprint).digest()

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
                raise self.refused(f"no cache of a reference's log-probs, or damaged ({error})") from None
            raise UserError(f"cache_dir: {self.file} cannot be read or written: {error}; make room, or give another "
                            "cache_dir; what is in it is not scored again") from None

    def refused(self, why: str) -> UserError:
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


def surroundings(device: torch.device) -> int:
    """Stands for what should change values by rounding only, and may do more by mistake: see `check`."""
    used = {getattr(value, "__module__", None) for value in vars(sys.modules[Policy.__module__]).values()}
    files = sorted(REPOSITORY / f"{name}.py" for name in used if isinstance(name, str))
    code = [file.read_text() for file in files if file.is_file()]  # of policy.py and what it imports
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    state = repr((code, kind, torch.get_float32_matmul_precision()))
    return int.from_bytes(hashlib.blake2b(state.encode(), digest_size=6).digest(), "big")


# Filling ------------------------------------------------------------------------------------------------------------

def fill_cache(reference: Policy, batches: Iterable[Sequence[Group]], total: int, roles: Sequence[str], folder: Path, *,
               budget: int, share: bool) -> CachedReference:
    """The cache in `folder`, with all that `scored` may be asked about the batches, which have `total` groups.

    batches: may be iterated more than once. What the cache lacks is scored and written a microbatch at a time, so that
    a fill that was killed goes on where it was. Errors: `UserError` where an entry is damaged, or fails `check`.
    """
    cache = CachedReference(reference, folder)
    with closed_on_error(cache):
        fill(cache, reference, [batches], total, roles, budget, share)
    return cache


def fill(cache: CachedReference, reference: Policy, loaders: Sequence[Iterable[Sequence[Group]]], total: int,
         roles: Sequence[str], budget: int, share: bool) -> None:
    """Completions of one prompt are scored together wherever they stand in the data, and all by length.

    Where more is to be scored than may be held, that is so of each of several parts of the prompts.
    """
    survey = look_up(cache, loaders, roles)
    for origin, texts in survey.held.items():
        if origin != cache.origin and not cache.is_marked("trusted", origin):
            check(cache, reference, texts, budget, share)
            cache.mark("trusted", origin)
    if not survey.n_lacking:
        return
    parts = math.ceil(survey.n_lacking / HELD)
    examples = math.ceil(total * survey.n_lacking / survey.n_asked)
    with Progress("reference", examples) as bar:
        for part in range(parts):
            texts = list((survey if parts == 1 else look_up(cache, loaders, roles, part, parts)).lacking.values())
            ids, done = sum(len(prompt) + len(ids) for prompt, ids in texts), 0
            for entries in live(reference, texts, budget, share):
                cache.write(entries)
                done += sum(len(prompt) + len(ids) for (prompt, ids), _ in entries)
                bar.advance(int(examples * (part + done / ids) / parts) - bar.done, {})
            bar.advance(examples * (part + 1) // parts - bar.done, {})


@dataclass
class Survey:
    """What the cache has of some data."""

    lacking: dict[bytes, Text] = field(default_factory=dict)  # key -> what is to be scored; of all data, `HELD` at most
    held: dict[int, list[Text]] = field(default_factory=dict)  # origin -> the first few that are there; see `check`
    n_asked: int = 0  # completions, as often as they come
    n_lacking: int = 0  # likewise, but those that are held in `lacking` once


def look_up(cache: CachedReference, loaders: Sequence[Iterable[Sequence[Group]]], roles: Sequence[str], part: int = 0,
            parts: int = 1) -> Survey:
    """Survey one of several parts, about equal, of the loaders' prompts."""
    survey, prompts = Survey(), dict[bytes, Ids]()
    groups = itertools.chain.from_iterable(itertools.chain.from_iterable(loaders))
    while chunk := list(itertools.islice(groups, CHUNK)):
        texts = dict[bytes, Text]()
        for group in chunk:
            if parts > 1 and zlib.crc32(array("i", group.prompt).tobytes()) % parts != part:
                continue
            completions = [group.completions[role] for role in roles if role in group.completions]
            texts.update(zip(cache.keys(group.prompt, completions), ((group.prompt, ids) for ids in completions),
                             strict=True))
            survey.n_asked += len(completions)
        found = cache.entries({key: len(ids) for key, (_, ids) in texts.items()})
        for key, (prompt, ids) in texts.items():
            if key in found:
                some = survey.held.setdefault(found[key].origin, [])
                some.extend([(prompt, ids)] * (len(some) < CHECKED))
            elif key not in survey.lacking:
                survey.n_lacking += 1
                if parts > 1 or len(survey.lacking) < HELD:
                    compact = array("i", prompt)
                    survey.lacking[key] = prompts.setdefault(compact.tobytes(), compact), array("i", ids)
    return survey


def check(cache: CachedReference, reference: Policy, texts: Sequence[Text], budget: int, share: bool) -> None:
    """Score some entries again that other `surroundings` gave. Errors: `UserError` where they differ.

    In the same surroundings there is nothing that this could find out: the fingerprint covers what a value is meant to
    depend on, and checksums that it is what was written. It is done once for each code that scores (where `SCORING`
    may have been forgotten) and each kind of GPU.
    """
    tolerance = TOLERANCES[reference.dtype]
    for (prompt, ids), value in itertools.chain.from_iterable(live(reference, texts, budget, share)):
        cached = cache.scored([Group(prompt, {"": ids}, 0)], [""])["token_logps"][0, ""].cpu()
        error, scale = (cached - value).norm().item(), 1 + value.norm().item()
        if not error <= tolerance * scale:
            raise cache.refused(f"an entry is off by {error / scale:.2g} of what this very model gives now (up to "
                                f"{tolerance:g} is rounding)")


@torch.no_grad()
def live(reference: Policy, texts: Iterable[Text], budget: int, share: bool) -> Iterator[list[tuple[Text, Tensor]]]:
    """The texts, a microbatch at a time, with the (T,) log-probs of each, on the CPU; the longest come first."""
    groups = gathered(texts, SHARED if share else 1, budget)
    groups.sort(key=lambda group: (len(group.completions) > 1, len(group)), reverse=True)
    for start in range(0, len(groups), WINDOW):
        for rows in cut_into_microbatches(groups[start:start + WINDOW], list(map(str, range(SHARED))), budget,
                                          share=share, window=reference.window):
            values = reference(rows)["token_logps"].cpu().split(rows.lengths)
            yield list(zip(rows.texts, values, strict=True))


def gathered(texts: Iterable[Text], most: int, budget: int) -> list[Group]:
    """The texts as groups: completions of one prompt together, up to `most` and as many ids as the budget has."""
    groups, latest = list[Group](), dict[bytes, dict[str, Ids]]()
    for prompt, ids in texts:
        together = latest.get(key := array("i", prompt).tobytes())
        if together is None or len(together) == most or sum(map(len, (prompt, ids, *together.values()))) > budget:
            together = latest[key] = {}
            groups.append(Group(prompt, together, len(groups)))
        together[str(len(together))] = ids
    return groups


# For a run ----------------------------------------------------------------------------------------------------------

def is_cached(config: "DictConfig", roles: Sequence[str]) -> bool:
    """Whether the reference's log-probs of these roles are read from the cache: never those of one that moves."""
    return bool(config.loss.use_reference_model and config.reference == "cached" and roles
                and not config.loss.sync_reference_every)


def prepare_reference(config: "DictConfig", model: Policy | None, roles: Sequence[str],
                      loaders: Sequence["DataLoader"], share: bool) -> Policy | CachedReference | None:
    """The reference as training asks it: the cache, filled for the loaders' data, or else `model` as it is.

    model: the reference; where it is cached, the policy before training will do, and no second model is made of it
    that would have the same bits. A loader's `fingerprint`, where it has one, stands for all that it yields: what was
    complete for it is not looked up again.
    """
    if model is None or not is_cached(config, roles):
        return model
    with frozen(config, model) as reference:
        cache = CachedReference(reference, Path(config.cache_dir).expanduser())
        with closed_on_error(cache):
            unknown = [loader for loader in loaders if not cache.is_marked(*complete(loader, roles))]
            fill(cache, reference, unknown, sum(map(len, unknown)), roles, token_budget(config, reference), share)
            for loader in unknown:
                if hasattr(loader, "fingerprint"):
                    cache.mark(*complete(loader, roles))
    return cache


def complete(loader: "DataLoader", roles: Sequence[str]) -> tuple[object, ...]:
    """What is noted down when all of the loader's data is there."""
    return ("complete", type(loader).__qualname__, len(loader), sorted(roles), getattr(loader, "fingerprint", None))


@contextlib.contextmanager
def frozen(config: "DictConfig", policy: Policy) -> Iterator[Policy]:
    """The reference, until training moves the policy: that itself, where a copy would have the same bits."""
    stored, lm = compute_dtype(config.model.reference_dtype), policy.lm
    if any(tensor.dtype != stored for tensor in (*lm.parameters(), *lm.buffers()) if tensor.is_floating_point()):
        reference = make_reference(config, policy)
        assert reference is not None, "the loss wants one"
        yield reference
        return
    training = lm.training
    lm.eval()  # checkpoints activations only in training mode
    try:
        yield policy
    finally:
        lm.train(training)


@contextlib.contextmanager
def opened(reference: Policy | CachedReference | None) -> Iterator[Policy | CachedReference | None]:
    """Context at whose end it is closed, if it is a cache."""
    try:
        yield reference
    finally:
        if isinstance(reference, CachedReference):
            reference.close()
