"""A whole HTML document around sections: one file, no script, no network."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import LauncherError
from launcher.files import write_whole
from launcher.report.markup import tag, text
from launcher.report.style import css


def document(title: str, *body: str) -> str:
    """Return the document; `title` is what a browser's tab shows."""
    head = "".join(
        [
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            tag("title", text(title)),
            tag("style", css()),
        ]
    )
    content = tag("main", *body)
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", head)}{tag("body", content)}</html>\n'


def section(title: str, *content: str) -> str:
    """Return a part with its heading; nothing where it would hold nothing."""
    return tag("section", tag("h2", text(title)), *content) if any(content) else ""


def tiles(entries: list[tuple[str, str, str]]) -> str:
    """Return the figures at the top: name, value and unit of each."""
    shown = [
        tag("div", tag("dt", text(name)), tag("dd", text(value), " ", tag("small", text(unit))))
        for name, value, unit in entries
    ]
    return tag("dl", *shown, class_="tiles")


def write(place: str | Path, html: str, *, key: str = "report") -> Path:
    """Write a page whole or not at all, and return where; raise LauncherError where that cannot be.

    `key` is the word that names another place.
    """
    path = Path(place).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    except OSError as error:
        raise LauncherError(
            f"{key}={path} cannot be written: {error.strerror}; name a file in a folder of yours"
        ) from error
    return path
