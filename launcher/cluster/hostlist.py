"""Slurm's short form of many names: `node[0-1,3]` and back to the names it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator

_RANGE = re.compile(r"\[([^\]]*)\]")


def expand(text: str) -> tuple[str, ...]:
    """Return the names in `text`, in its order; leading zeros stay. Raise ValueError for an open bracket."""
    return tuple(name for part in _parts(text) for name in _expand_one(part))


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key by which node10 follows node9."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


def _parts(text: str) -> Iterator[str]:
    """Split at commas outside brackets."""
    if text.count("[") != text.count("]"):
        raise ValueError(f"'{text}' is not a list of hosts: a bracket stays open")
    part, depth = "", 0
    for letter in text.strip():
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    if part:
        yield part


def _expand_one(text: str) -> Iterator[str]:
    found = _RANGE.search(text)
    if found is None:
        yield text
        return
    head, tail = text[: found.start()], text[found.end() :]
    for piece in found[1].split(","):
        first, dash, last = piece.partition("-")
        numbers = range(int(first), int(last) + 1) if dash else None
        middles = [f"{n:0{len(first)}d}" for n in numbers] if numbers is not None else [piece]
        for middle in middles:
            yield from (f"{head}{middle}{rest}" for rest in _expand_one(tail))
