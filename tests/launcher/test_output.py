"""What a verb prints: one JSON document or text, and streams that are closed or leave early."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

import pytest

from launcher.errors import LauncherError
from launcher.output import Output, open_standard_streams, print_line


def test_text_is_for_people_and_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).result({"a": 1}, "one")
    assert capsys.readouterr() == ("one\n", "")
    Output(as_json=True).result({"a": 1}, "one")
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    Output(as_json=True).say("aside")
    assert capsys.readouterr() == ("", "aside\n")


def test_what_is_no_json_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    nested: dict[str, Any] = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}}
    Output(as_json=True).result(nested)
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_a_reader_that_left_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=False) as stream:
        print_line("nobody hears this", stream)
        print_line("nor this", stream)  # the pipe has become nothing


def test_another_failure_is_one_sentence() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(LauncherError, match="the output cannot be written: No space left on device"):
        print_line("words", Full())


def test_streams_that_are_missing_are_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    open_standard_streams()
    assert sys.stdout is not None
