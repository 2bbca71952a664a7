"""The document around a page, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LauncherError
from launcher.report.document import document, section, tiles, write


def test_a_document_is_whole_and_needs_nothing_else(reader: Any) -> None:
    html = document("a & b", section("First", tiles([("step", "3", "of 4")])))
    assert html.startswith("<!DOCTYPE html>")
    assert reader(html).words == "a & bFirststep3 of 4"
    assert reader.needs_nothing_else(html)


def test_a_section_of_nothing_is_nothing() -> None:
    assert section("Alerts", "", "") == ""


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.html"
    write(path, "<p>é</p>")
    assert path.read_text(encoding="utf-8") == "<p>é</p>"
    assert [file.name for file in path.parent.iterdir()] == ["plan.html"]
    with pytest.raises(LauncherError, match=r"report=.*deep cannot be written: Is a directory; name a file"):
        write(path.parent, "")
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]
