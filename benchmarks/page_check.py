"""Opens a page in headless Chromium: what its console says, what it asks the network for, and how it looks.

Run: python -m benchmarks.page_check RUN_DIR/report.html --images docs/images --name report
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import record

_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--disable-features=OptimizationHints,MediaRouter,Translate", "--virtual-time-budget=2000"),
    # Asked for is noted, but nothing leaves this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One way to look at a page."""

    name: str
    width: int
    height: int
    dark: bool


LOOKS = (
    Look(name="light", width=1200, height=1500, dark=False),
    Look(name="dark", width=1200, height=1500, dark=True),
    # 500 is the least that a window of Chromium takes; a page that asks for 22rem a column lays out as on a phone.
    Look(name="phone", width=500, height=1500, dark=True),
)
PHONE = 360  # pixels in CSS; what the narrowest phones in use have


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    page = Path(options.page).resolve()
    found: dict[str, Any] = {}
    for look in LOOKS:
        image = Path(options.images) / f"{options.name}-{look.name}.png"
        console, hosts = check(page, look, image=image.resolve(), browser=options.browser)
        found[look.name] = {"console": console, "hosts": sorted(hosts), "bytes": image.stat().st_size}
    found["width on a phone"] = {
        "offered": PHONE,
        "taken": width_taken(page, offered=PHONE, browser=options.browser),
    }
    print(json.dumps(found, indent=2))
    if options.record:
        done = record.create("page_check", arguments=["PAGE"], figures=found)
        print(f"recorded {record.write(done, name='page_check').name}")
    complaints = any(found[look.name]["console"] or found[look.name]["hosts"] for look in LOOKS)
    if complaints or found["width on a phone"]["taken"] > PHONE:
        sys.exit(1)


def check(page: Path, look: Look, *, image: Path, browser: str) -> tuple[list[str], set[str]]:
    """Return what the console said and which hosts the page itself asked for, and leave a picture."""
    console, hosts = open_page(page, look, image=image, browser=browser)
    return console, hosts - _asked_anyway(look, browser=browser)


def open_page(page: Path, look: Look, *, image: Path, browser: str) -> tuple[list[str], set[str]]:
    """Return what the console said and which hosts were asked for, and leave a picture."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if look.dark else []
        command = [
            *(browser, *_QUIET, *scheme, "--enable-logging=stderr", f"--user-data-dir={folder}/profile"),
            *(f"--window-size={look.width},{look.height}", f"--screenshot={image}", f"--log-net-log={log}"),
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return console_lines(done.stderr), requested(log.read_text(encoding="utf-8", errors="replace"))


def console_lines(text: str) -> list[str]:
    """Return what the page wrote to its console; Chromium marks it in its own log."""
    return [line for line in text.splitlines() if "CONSOLE" in line]


def requested(log: str) -> set[str]:
    """Return the hosts in Chromium's network log; files of this machine have none."""
    addresses = re.findall(r'"url": ?"([a-z]+://[^"]*)"', log)
    return {host for host in (urlsplit(address).hostname for address in addresses) if host}


def width_taken(page: Path, *, offered: int, browser: str) -> int:
    """Return the pixels that a page takes in a frame `offered` pixels wide: more, where one has to scroll sideways."""
    frame = (
        f'<!DOCTYPE html><iframe src="{page.as_uri()}" width="{offered}" height="800" style="border:0" '
        'onload="document.title = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    with tempfile.TemporaryDirectory() as folder:
        around = Path(folder) / "frame.html"
        around.write_text(frame, encoding="utf-8")
        command = [browser, *_QUIET, "--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
        done = subprocess.run(
            [*command, "--dump-dom", around.as_uri()], capture_output=True, text=True, timeout=300, check=True
        )
    (title,) = re.findall(r"<title>(\d+)</title>", done.stdout)
    return int(title)


def _asked_anyway(look: Look, *, browser: str) -> set[str]:
    """Return the hosts that the browser itself asks for with an empty page."""
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / "blank.html"
        blank.write_text("<!DOCTYPE html><title>blank</title>", encoding="utf-8")
        return open_page(blank, look, image=Path(folder) / "blank.png", browser=browser)[1]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page")
    parser.add_argument("--images", default="docs/images")
    parser.add_argument("--name", default="report")
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
