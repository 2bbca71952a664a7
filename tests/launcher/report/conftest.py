"""A reader of pages, and a run that was stopped, resumed and finished."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from launcher.run_dir import RunDir, open_run

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Reader(HTMLParser):
    """Checks that elements nest, and notes ids, references and what every svg holds."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.named: list[bool] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> repeats an attribute"
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "action", "data")]
        if self.open and self.open[-1] == "svg":
            self.named[-1] |= tag == "title"
        if tag == "svg":
            assert given["role"] == "img"
            assert set((given["aria-labelledby"] or "").split()) == {
                f"{(given['aria-labelledby'] or '').split('-')[0]}-{part}" for part in ("title", "text")
            }
            self.named.append(False)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data

    @staticmethod
    def needs_nothing_else(html: str) -> bool:
        """Tell whether a browser would ask for anything beside the page."""
        return not re.search(r"https?://|<script|<link|<iframe|@import|url\(", html)


@pytest.fixture
def reader() -> type[Reader]:
    """Reads a page: `ids`, `references`, `named`, `words`."""
    return Reader


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of two starts, made by the command itself."""
    path = tmp_path_factory.mktemp("runs") / "first"
    words = [
        "strategy=fake",
        "cluster.gpus_per_node=1",
        "training.num_steps=24",
        "training.global_batch_size=8",
    ]
    words += [
        "training.sequence_length=32",
        "data.max_bytes=200000",
        "stop_at_step=11",
        "checkpoint.interval=6",
    ]
    words += ["monitor=none", "monitor.sample_interval=4", f"run_dir={path}"]
    for verb in (["train", *words], ["resume", str(path)]):
        command = [sys.executable, "-m", "launcher", *verb]
        subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
    return open_run(path)
