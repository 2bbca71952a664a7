"""metrics.jsonl followed: only what is new is read, and a file that took its place is read from its beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunDirError
from launcher.monitor import follow
from launcher.monitor.follow import Followed


def append(path: Path, *steps: int, loss: float | str = 1.0, end: str = "\n", **more: Any) -> None:
    with path.open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": loss, "step_time_s": float(step), **more}) + end)


def test_each_line_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "metrics.jsonl", 0
    parse = follow.parse

    def counting(line: str) -> dict[str, Any] | None:
        nonlocal seen
        seen += 1
        return parse(line)

    monkeypatch.setattr(follow, "parse", counting)
    followed = Followed(file, kept=["loss"])
    followed.update()
    assert followed.newest == {}
    append(file, *range(1, 101), goodput=0.5)
    for step in range(101, 111):
        followed.update()
        append(file, step, loss=2.0)
    followed.update()
    assert seen == 110
    assert followed.curves == {"loss": [1.0] * 100 + [2.0] * 10}
    assert (followed.newest["step"], followed.newest["goodput"]) == (110, 0.5)
    assert list(followed.recent_s) == list(range(91, 111))


def test_lines_count_when_they_are_whole_and_numbers_when_they_are_some(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append(file, 1)
    append(file, 2, end="")
    followed = Followed(file, kept=["loss"])
    followed.update()
    assert followed.newest["step"] == 1
    with file.open("a") as rest:
        rest.write("\n{damaged\n")
    append(file, 3, loss="nan")
    followed.update()
    assert (followed.newest["step"], followed.curves["loss"]) == (3, [1.0, 1.0])


def test_steps_that_a_restart_took_back_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append(file, 1, 2, 3)
    followed = Followed(file, kept=["loss"])
    followed.update()
    append(tmp_path / "aside", 1, 2, loss=5.0)
    (tmp_path / "aside").replace(file)
    followed.update()
    assert (followed.newest["step"], followed.curves["loss"]) == (2, [5.0, 5.0])


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot be read: Is a directory"):
        Followed(tmp_path, kept=[]).update()
