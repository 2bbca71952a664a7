from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from launcher.run_dir import RunDir
from launcher.supervise.stop_requests import StopRequests, handling


def test_the_first_request_is_a_file_and_the_second_a_signal(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    requests = StopRequests(run=run)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as child:
        requests.process = child
        requests(signal.SIGINT, None)
        assert run.stop_file.exists()
        assert child.poll() is None
        requests(signal.SIGTERM, None)
        assert child.wait(timeout=60) == -signal.SIGTERM
    assert requests.exit_code == 130  # of the first one


def test_an_export_is_ended_at_once(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    requests = StopRequests(run=run, exporting=True)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as child:
        requests.process = child
        requests(signal.SIGTERM, None)
        assert child.wait(timeout=60) == -signal.SIGTERM
    assert not run.stop_file.exists()


def test_a_wait_ends_with_a_request(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    requests = StopRequests(run=run)
    requests.sleep(0.01)
    assert not requests.asked()
    threading.Timer(0.2, run.stop_file.touch).start()
    started = time.monotonic()
    requests.sleep(600)
    assert time.monotonic() - started < 300
    assert requests.asked()
    assert requests.exit_code == 0


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests = StopRequests(run=RunDir(path=tmp_path))
    with handling(requests):
        assert signal.getsignal(signal.SIGTERM) is requests
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is before
    assert requests.exit_code == 129


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    requests = StopRequests(run=RunDir(path=tmp_path))
    try:
        with handling(requests):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert requests.received is None


def test_a_request_is_heard_where_nothing_can_be_written(tmp_path: Path) -> None:
    """The terminal went away, and so did the folder."""
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    os.dup2(writer, 2)
    requests = StopRequests(run=RunDir(path=tmp_path / "gone"))
    try:
        requests(signal.SIGTERM, None)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)
    assert (requests.received, requests.count) == (signal.SIGTERM, 1)


def test_a_signal_may_be_meant_for_one_launcher_only(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    requests = StopRequests(run=run, only_here=frozenset({signal.SIGHUP}))
    requests(signal.SIGHUP, None)
    assert requests.leaves and not run.stop_file.exists()
    assert requests.exit_code == 129
