"""The rows of an epoch: what each is, in a few integers."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np


class Row(NamedTuple):
    """What a row of a batch is: generations of one example by their role (chosen, rejected), not yet tokenised."""

    number: int  # of the example
    roles: dict[str, int]  # role -> index of the generation
    pair: int = -1  # index of the pair that it belongs to
    control: str = ""  # a token of the vocabulary that stands at the end of the prompt


class RowTable(Sequence[Row]):
    """Rows as columns of integers: 16 bytes for a row of one generation."""

    def __init__(self, rows: Iterable[Row]) -> None:
        kinds = dict[tuple[tuple[str, ...], str], int]()
        numbers, pairs, kind, indices = array("i"), array("i"), array("i"), array("i")
        for row in rows:
            numbers.append(row.number)
            pairs.append(row.pair)
            kind.append(kinds.setdefault((tuple(row.roles), row.control), len(kinds)))
            indices.extend(row.roles.values())
        self.kinds = list(kinds)  # (roles, control token) of each kind of row
        self.numbers, self.pairs, self.kind = (np.array(column, np.int32) for column in (numbers, pairs, kind))
        widths = np.array([len(roles) for roles, _ in self.kinds], np.int64)
        self.filled = np.arange(max(widths, default=0)) < widths[:, None]  # (kinds, roles): which the kind has
        self.indices = np.zeros((len(self.kind), self.filled.shape[1]), np.int32)  # (rows, roles) of generations
        self.indices[self.filled[self.kind]] = indices

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "RowTable":
        return rows if isinstance(rows, RowTable) else cls(rows)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "RowTable": ...

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        roles, control = self.kinds[self.kind[place]]
        return Row(int(self.numbers[place]), dict(zip(roles, self.indices[place].tolist(), strict=False)),
                   int(self.pairs[place]), control)

    def take(self, places: np.ndarray) -> "RowTable":
        """The rows at these places, or where this is true."""
        part = RowTable(())
        part.kinds, part.filled = self.kinds, self.filled
        part.numbers, part.pairs, part.kind, part.indices = (
            column[places] for column in (self.numbers, self.pairs, self.kind, self.indices))
        return part

    def of_class(self, role: str) -> np.ndarray:
        """(rows,) whether a row's first role is this one."""
        return np.isin(self.kind, [number for number, (roles, _) in enumerate(self.kinds) if roles[:1] == (role,)])

    def controls(self) -> np.ndarray:
        """(rows,) whether a control token ends the row's prompt."""
        return np.array([bool(control) for _, control in self.kinds], bool)[self.kind]
