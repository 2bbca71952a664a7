"""The launcher of another host, led by orders written here, with stand-ins for its workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launcher import errors
from launcher.cluster.network import Door
from launcher.run_dir import RunDir
from launcher.submit import hosts
from launcher.supervise.follower import follow
from launcher.supervise.notes import Act, Order, Post, Reader, Report, State, order_file, report_file

Stand = Callable[[str], None]


class First(threading.Thread):
    """The first host's launcher: runs a script of orders; what goes wrong in it is raised by `follow`'s caller."""

    def __init__(self, run: RunDir, script: Callable[[First], Any]) -> None:
        super().__init__()
        self._run, self._script = run, script
        self.fault: BaseException | None = None

    def run(self) -> None:
        self._reports: Reader[Report] = Reader(report_file(self._run, 1), Report, now=0)
        try:
            with Post(order_file(self._run), Order(start=4, act="stop")) as self._post:
                self._script(self)
        except BaseException as error:
            self.fault = error

    def order(self, act: Act, *, start: int = 5, exit_code: int = 0) -> None:
        self._post.put(Order(start=start, act=act, exit_code=exit_code))

    def wait(self, state: State, *, start: int = 5) -> Report:
        until = time.monotonic() + 60
        while True:
            found = self._reports.look(0)
            if found is not None and (found.start, found.state) == (start, state):
                return found
            assert time.monotonic() < until, found
            time.sleep(0.02)

    def reached(self) -> Report:
        until = time.monotonic() + 60
        while not (found := self._reports.look(0)) or not found.reaches:
            assert time.monotonic() < until, found
            time.sleep(0.02)
        return found


@contextmanager
def led(run: RunDir, script: Callable[[First], Any]) -> Iterator[None]:
    first = First(run, script)
    first.start()
    try:
        yield
    finally:
        first.join()
        if first.fault is not None:
            raise first.fault


def test_it_runs_its_part_and_goes_home(on_two_hosts: RunDir, worker: Stand) -> None:
    def script(first: First) -> None:
        first.order("gather")
        assert first.wait("gathered").host
        with Door(hosts.port_of(on_two_hosts.path, on_two_hosts.job()) + 1):
            assert first.reached().start == 5
        first.order("run")
        assert first.wait("ended").code == 0
        first.order("end")

    worker("print('fine', file=sys.stderr)")
    with led(on_two_hosts, script):
        assert follow(on_two_hosts, node=1, quiet_stdout=True) == 0
    assert (on_two_hosts.logs / "stderr_node_00001.log").read_text() == "fine\n"
    assert [event["event"] for event in on_two_hosts.events()] == ["created"]


def test_it_asks_again_after_devices_that_are_missing(on_two_hosts: RunDir) -> None:
    sound = on_two_hosts.path / "sound"
    sound.write_text("0")
    config = on_two_hosts.config_file.read_text()
    on_two_hosts.config_file.write_text(
        config.replace("health_command: null", f"health_command: cat {sound}")
    )

    def script(first: First) -> None:
        first.order("gather")
        assert first.wait("gathered").devices == 0
        sound.write_text("1")
        until = time.monotonic() + 60
        while first.wait("gathered").devices != 1:
            assert time.monotonic() < until
        first.order("end")

    with led(on_two_hosts, script):
        assert follow(on_two_hosts, node=1, quiet_stdout=True) == 0


def test_it_tells_who_was_killed_and_leaves_with_the_first_hosts_code(
    on_two_hosts: RunDir, worker: Stand
) -> None:
    def script(first: First) -> None:
        for start in (5, 6):
            first.order("gather", start=start)
            first.wait("gathered", start=start)
            first.order("run", start=start)
            report = first.wait("ended", start=start)
            assert report.code == -signal.SIGKILL
            assert [(death.rank, death.signal) for death in report.deaths] == [(None, signal.SIGKILL)]
        first.order("end", start=6, exit_code=12)

    worker("os.kill(os.getpid(), signal.SIGKILL)")
    with (
        led(on_two_hosts, script),
        pytest.raises(errors.LostRankError, match="ended on its first host with exit code 12"),
    ):
        follow(on_two_hosts, node=1, quiet_stdout=True)


def test_it_joins_no_start_that_it_did_not_gather_for(on_two_hosts: RunDir, worker: Stand) -> None:
    def script(first: First) -> None:
        first.order("run")
        first.wait("waiting", start=0)
        time.sleep(1)
        first.wait("waiting", start=0)
        first.order("end", exit_code=143)

    worker("run.stop_file.touch()")
    with led(on_two_hosts, script):
        assert follow(on_two_hosts, node=1, quiet_stdout=True) == 143
    assert not on_two_hosts.stop_file.exists()


def test_it_examines_and_stops_its_ranks(on_two_hosts: RunDir, worker: Stand) -> None:
    def script(first: First) -> None:
        first.order("gather")
        first.wait("gathered")
        first.order("run")
        first.wait("running")
        while not (on_two_hosts.heartbeats / "rank_00001.json").exists():
            time.sleep(0.02)
        time.sleep(0.5)
        first.order("examine")
        assert first.wait("examined").stopped == (1,)
        first.order("stop")
        report = first.wait("ended")
        assert (report.code, report.deaths) == (None, ())
        first.order("end")

    worker(
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nHeart(run.heartbeats, rank=1)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: time.sleep(1)"
    )
    with led(on_two_hosts, script):
        assert follow(on_two_hosts, node=1, quiet_stdout=True) == 0


def test_without_the_first_host_it_ends_its_ranks_and_then_itself(
    on_two_hosts: RunDir, worker: Stand
) -> None:
    def script(first: First) -> None:
        first.order("gather")
        first.wait("gathered")
        first.order("run")
        first.wait("running")
        until = time.monotonic() + 60
        while not (on_two_hosts.path / "pid").exists():
            assert time.monotonic() < until
            time.sleep(0.02)

    worker(
        "Path(run.path, 'new').write_text(str(os.getpid()))\n"
        "os.replace(run.path / 'new', run.path / 'pid')\nwhile True: time.sleep(1)"
    )
    with led(on_two_hosts, script), pytest.raises(errors.LostRankError, match=r"supervise\.host_wait_s=3 s"):
        follow(on_two_hosts, node=1, quiet_stdout=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int((on_two_hosts.path / "pid").read_text()), 0)


def test_a_connection_that_hangs_up_is_no_wish_to_stop_the_run(on_two_hosts: RunDir, worker: Stand) -> None:
    def script(first: First) -> None:
        first.order("gather")
        first.wait("gathered")
        os.kill(os.getpid(), signal.SIGHUP)

    worker("")
    with led(on_two_hosts, script):
        assert follow(on_two_hosts, node=1, quiet_stdout=True) == 129
    assert not on_two_hosts.stop_file.exists()
