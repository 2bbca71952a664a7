"""Where flat slices of a parameter lie in the whole tensor: the geometry behind checkpoints that any plan reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Index = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A block of a tensor: `sizes[i]` elements from `offsets[i]` on along every axis."""

    offsets: Index
    sizes: Index

    @property
    def numel(self) -> int:
        """Elements inside."""
        return math.prod(self.sizes)

    def moved(self, by: Index) -> Box:
        """Return it further along every axis."""
        return Box(offsets=tuple(a + b for a, b in zip(self.offsets, by, strict=True)), sizes=self.sizes)

    @property
    def ends(self) -> Index:
        """Where it ends along every axis."""
        return tuple(a + b for a, b in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a rank's parameter, or its part of one, lies in a tensor of Hugging Face's layout."""

    name: str
    shape: Index  # of the whole tensor
    shift: Index  # of the part's first element
    is_copy: bool = False  # another rank holds the same and writes it


def cut(shape: Index, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that the elements `start` to `stop` of a row-major tensor fill, in their order.

    A part of the first row, all rows between, a part of the last one: at most 2n - 1 boxes for n axes.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box(offsets=(start,) * len(shape), sizes=(stop - start,) * len(shape))
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = start // row, stop // row  # rows in which it begins, and before which whole ones end
    if start % row:
        yield from _within(first, cut(inner, start % row, min(row, stop - first * row)))
        first += 1
    if first < last:
        yield Box(offsets=(first, *(0,) * len(inner)), sizes=(last - first, *inner))
    if first <= last and stop % row:
        yield from _within(last, cut(inner, 0, stop % row))


def _within(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box(offsets=(row, *box.offsets), sizes=(1, *box.sizes))
