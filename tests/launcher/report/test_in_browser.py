"""The report of a run in a headless Chromium: nothing on its console, nothing asked of a network, something to see."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.page_check import LOOKS, PHONE, Look, check, width_taken
from launcher import cli
from launcher.run_dir import RunDir

# Set by continuous integration: a machine without a browser is a fault there, and no reason to skip.
REQUIRED = "MESHWRIGHT_TEST_BROWSER"


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium")
    if found is None and REQUIRED not in os.environ:
        pytest.skip("chromium not found; Debian's package is called chromium")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def page(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.run(["report", str(finished_run.path), f"out={path}"]) == 0
    return path


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.name)
def test_a_page_needs_nothing_and_complains_of_nothing(
    page: Path, look: Look, browser: str, tmp_path: Path
) -> None:
    image = tmp_path / "look.png"
    assert check(page, look, image=image, browser=browser) == ([], set())
    with Image.open(image) as picture:
        shades = picture.convert("L").getcolors()
    assert shades is not None and len(shades) > 20
    (_, ground) = max(shades)
    assert ground < 64 if look.dark else ground > 192


def test_nothing_is_wider_than_a_phone(page: Path, browser: str) -> None:
    assert width_taken(page, offered=PHONE, browser=browser) == PHONE


def test_a_page_that_is_too_wide_would_be_seen(browser: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    wide.write_text('<!DOCTYPE html><body style="margin:0"><div style="width:900px">x</div>')
    assert width_taken(wide, offered=PHONE, browser=browser) == 900
