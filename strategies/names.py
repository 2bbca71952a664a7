"""Say what was probably meant: one sentence part for an unknown word."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(word: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'X'?`, or the list of valid words when none is close."""
    words = sorted(valid)
    # A beginning says more than any distance: h100 means h100_sxm, not v100.
    close = [candidate for candidate in words if candidate.startswith(word)] if word else []
    close = close[:1] or get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"use one of {', '.join(words)}" if words else "no key is accepted here"
