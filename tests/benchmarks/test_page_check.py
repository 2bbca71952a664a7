"""What is read from Chromium's own logs; the browser itself runs in the benchmark."""

from __future__ import annotations

from benchmarks.page_check import console_lines, requested


def test_the_console_is_told_from_the_browsers_own_words() -> None:
    log = (
        "[1:1:ERROR:bus.cc(407)] Failed to connect to the bus\n"
        '[1:1:INFO:CONSOLE(3)] "Uncaught ReferenceError: x is not defined", source: file:///a.html (3)\n'
    )
    assert len(console_lines(log)) == 1
    assert "ReferenceError" in console_lines(log)[0]


def test_hosts_are_those_of_requests_and_no_files() -> None:
    log = (
        '{"params":{"url":"file:///tmp/report.html"},"type":1},\n'
        '{"params":{"url":"https://fonts.example.org/a.css"},"type":1},\n'
        '{"params":{"url": "ws://live.example.org:81/"},"type":1},\n'
    )
    assert requested(log) == {"fonts.example.org", "live.example.org"}
