"""HTML and SVG as text: elements, pictures with a title, tables. Everything that is not markup is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def tag(name: str, *content: str, **attributes: object) -> str:
    """Return one element around markup. `class_` is class, underscores in names are hyphens."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_figure(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{words}>{''.join(content)}</{name}>"


def text(value: object) -> str:
    """Return a value as text that is no markup."""
    return escape(str(value), quote=False)


def label(value: object, *, x: float, y: float, anchor: str = "start", kind: str = "label") -> str:
    """Write a word into a picture. `kind` is its class."""
    return tag("text", text(value), x=x, y=y, text_anchor=anchor, class_=kind)


def box(*, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """Draw a rectangle; `title` shows under the pointer."""
    inner = tag("title", text(title)) if title else ""
    return tag("rect", inner, x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=kind)


def line(*, x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def picture(*content: str, name: str, title: str, description: str, width: float, height: float) -> str:
    """Return an SVG with a title and a text alternative, in a frame that scrolls where the screen is narrow."""
    svg = _svg(
        *content,
        name=name,
        title=title,
        description=description,
        width=width,
        height=height,
        style=f"min-width:{round(0.72 * width)}px;max-width:{round(1.25 * width)}px",
    )
    return tag("div", svg, class_="scroll", tabindex=0, role="group", aria_label=title)


def drawing(
    *content: str, name: str, title: str, description: str, width: float, height: float, css: str
) -> str:
    """Return an SVG that is a file of its own: with its style sheet, its ground and its fonts."""
    ground = tag("rect", width="100%", height="100%", style="fill:var(--ground)")
    svg = _svg(
        tag("style", css),
        ground,
        *content,
        name=name,
        title=title,
        description=description,
        width=width,
        height=height,
        xmlns="http://www.w3.org/2000/svg",
        font_family='system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif',
    )
    return f"{svg}\n"


def _svg(
    *content: str, name: str, title: str, description: str, width: float, height: float, **more: str
) -> str:
    return tag(
        "svg",
        tag("title", text(title), id=f"{name}-title"),
        tag("desc", text(description), id=f"{name}-text"),
        *content,
        viewBox=f"0 0 {_figure(width)} {_figure(height)}",
        role="img",
        aria_labelledby=f"{name}-title {name}-text",
        **more,
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, words: Sequence[int] = (0,)
) -> str:
    """Return a table; `words` are the columns that are not figures."""

    def cells(row: Sequence[str], element: str, **more: str) -> str:
        kinds = ["words" if index in words else "figure" for index in range(len(row))]
        return "".join(
            tag(element, text(cell), class_=kind, **more) for cell, kind in zip(row, kinds, strict=True)
        )

    head = tag("thead", tag("tr", cells(header, "th", scope="col")))
    body = tag("tbody", *(tag("tr", cells(row, "td")) for row in rows))
    return tag("div", tag("table", tag("caption", text(caption)), head, body), class_="scroll", tabindex=0)


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return names beside their colours: pairs of class and name."""
    items = [
        tag("li", tag("span", class_=f"swatch {kind}", aria_hidden="true"), text(name))
        for kind, name in entries
    ]
    return tag("ul", *items, class_="legend")


def ticks(most: float, *, least: float = 0.0, count: int = 5) -> list[float]:
    """Return round values from `least` up to `most`, about `count` of them."""
    if most <= least:
        return [most]
    rough = (most - least) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(least / step * 0.999999), math.floor(most / step * 1.000001)
    return [index * step for index in range(first, last + 1)]


def _figure(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
