"""A file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.files import append_record, read_records, records, write_whole


def test_it_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "one\n")
    write_whole(file, "two: \u00fc\n")
    assert file.read_text(encoding="utf-8") == "two: \u00fc\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "one\n")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(file, "two\n")
    assert file.read_text() == "one\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("torn", ["", '{"n": 0}\n', '{"n": 0}\n{"n": 1, "te'])
def test_a_torn_line_takes_nothing_else_with_it(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(torn)
    for number in (2, 3):
        append_record(file, {"n": number})
    assert [record["n"] for record in records(file.read_text())] == [0, 2, 3][torn == "" :]
    assert list(read_records(file)) == list(records(file.read_text()))


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "none.jsonl")) == []
