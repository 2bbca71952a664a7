from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.supervise import notes
from launcher.supervise.notes import Death, Order, Post, Reader, Report, order_file, report_file


def test_a_note_is_fresh_as_long_as_its_writer_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "BEAT_S", 0.02)
    file = tmp_path / "hosts" / "order.json"
    with Post(file, Order(start=3, act="run")) as post:
        reader = Reader(file, Order, now=0)
        until = time.monotonic() + 30
        while reader.look(7) is None:
            assert time.monotonic() < until
        post.put(Order(start=3, act="stop"))
        found = reader.look(8)
        assert found is not None and (found.start, found.act, reader.changed) == (3, "stop", 8)
    left = reader.look(9)
    assert reader.look(10) == left
    assert reader.changed <= 9


def test_what_an_earlier_launcher_left_is_no_word_of_anybody(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    with Post(order_file(run), Order(start=5, act="end")):
        pass
    reader = Reader(order_file(run), Order, now=1)
    assert reader.look(2) is None
    assert (reader.changed, reader.last_start()) == (1, 5)


def test_a_torn_note_changes_nothing(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    reader = Reader(report_file(run, 1), Report, now=0)
    assert reader.look(1) is None
    death = Death(rank=1, signal=9, host="b", log="l")
    report = Report(host="b", pid=7, state="ended", code=1, deaths=(death,), stopped=(1,), busy={"1": "f:3"})
    with Post(report_file(run, 1), report):
        found = reader.look(2)
    assert found is not None and (found.deaths, found.busy) == ((death,), {"1": "f:3"})
    report_file(run, 1).write_text(json.dumps({"host": "b"})[:-3])
    assert reader.look(3) == found
