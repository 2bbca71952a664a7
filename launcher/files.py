"""Files that appear whole or not at all, and files of JSON lines that outlive a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write `text` aside and rename it into place; an OSError leaves what was there, and nothing beside it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line; what a full disk has torn before it stays a line of its own."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, a line each; none where there is no file yet."""
    if path.exists():
        yield from records(path.read_text(encoding="utf-8", errors="replace"))


def records(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of `text`, a line each; a torn line is left out."""
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)
