"""The first host's view, with reports written here; launchers of real hosts: tests/integration/test_two_hosts.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from launcher.cluster import network
from launcher.errors import LostRankError
from launcher.run_dir import RunDir
from launcher.submit import hosts
from launcher.supervise.failure import explain
from launcher.supervise.notes import Death, Order, Post, Reader, Report, order_file, report_file
from launcher.supervise.others import Others, lead
from launcher.supervise.start import Ending
from launcher.supervise.stop_requests import StopRequests

NEVER = float("-inf")


@contextmanager
def other_host(where: RunDir, **answers: dict[str, Any]) -> Iterator[Post[Report]]:
    """A launcher on host b that answers orders by their names, `gather={"state": "gathered"}`, until the block ends."""
    over = threading.Event()
    with Post(report_file(where, 1), Report(host="b", pid=7)) as post:

        def obey() -> None:
            reader: Reader[Order] = Reader(order_file(where), Order, now=0)
            seen: Order | None = None
            while not over.wait(0.01):
                order = reader.look(0)
                if order is None or (seen and (seen.start, seen.act) == (order.start, order.act)):
                    continue
                seen = order
                if order.act in answers:
                    post.put(Report(**{"host": "b", "pid": 7, "start": order.start, **answers[order.act]}))

        thread = threading.Thread(target=obey)
        thread.start()
        try:
            yield post
        finally:
            over.set()
            thread.join()


READY = {"state": "gathered", "reaches": True}


@contextmanager
def gathered(where: RunDir, **answers: dict[str, Any]) -> Iterator[tuple[Others, ExitStack]]:
    """The first host and host b, both ready; closing the stack ends b's launcher."""
    with lead(where) as others, ExitStack() as stack:
        stack.enter_context(other_host(where, gather=READY, **answers))
        assert others.gather(StopRequests(run=where))
        others.run()
        yield others, stack


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_one_host_waits_for_nobody(frozen: Callable[..., RunDir]) -> None:
    run = frozen()
    with lead(run) as others:
        assert others.gather(StopRequests(run=run))
        others.run()
        assert others.trouble(lambda ranks: NEVER) is None
        assert others.examine() == ([], {})
        others.settle(at_once=False)
    assert (others.lost, others.code, others.deaths) == ([], 0, [])
    assert not run.hosts.exists()


def test_the_first_host_can_be_reached_while_it_leads(on_two_hosts: RunDir) -> None:
    port = hosts.port_of(on_two_hosts.path, on_two_hosts.job()) + 1
    with lead(on_two_hosts):
        assert network.answers("127.0.0.1", port)
    assert not network.answers("127.0.0.1", port)


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (None, "no launcher answers on b, after supervise.host_wait_s=3 s; bring it back"),
        ({"state": "waiting"}, "b is not ready yet"),
        ({"state": "gathered"}, "b cannot reach 127.0.0.1 over the network"),
        ({**READY, "devices": 0}, "b has 0 sound devices of 1"),
    ],
)
def test_a_start_waits_for_a_host_that_is_not_ready_but_not_for_ever(
    on_two_hosts: RunDir, report: dict[str, Any] | None, sentence: str
) -> None:
    with ExitStack() as stack:
        others = stack.enter_context(lead(on_two_hosts))
        if report is not None:
            stack.enter_context(other_host(on_two_hosts, gather=report))
        with pytest.raises(LostRankError, match=sentence):
            others.gather(StopRequests(run=on_two_hosts))


def test_a_request_to_stop_ends_the_wait(on_two_hosts: RunDir) -> None:
    on_two_hosts.stop_file.touch()
    with lead(on_two_hosts) as others:
        assert not others.gather(StopRequests(run=on_two_hosts))


def test_starts_are_counted_on_over_launchers(on_two_hosts: RunDir) -> None:
    for number in (1, 2):
        with gathered(on_two_hosts):
            found = Reader(order_file(on_two_hosts), Order, now=0).last_start()
            assert found == number


def test_a_silent_host_is_lost_once_its_ranks_are_quiet_as_well(on_two_hosts: RunDir) -> None:
    with gathered(on_two_hosts) as (others, b):
        b.close()
        alive_until = time.monotonic() + 3
        while time.monotonic() < alive_until:
            assert others.trouble(lambda ranks: time.monotonic()) is None
        assert others.trouble(lambda ranks: NEVER) == "lost"
        (lost,) = others.lost
        assert (lost.host, list(lost.ranks)) == ("b", [1])
        assert lost.why.startswith("no word from its launcher for ")


def test_a_host_that_is_cut_off_is_lost_though_its_launcher_talks(on_two_hosts: RunDir) -> None:
    with gathered(on_two_hosts, run={"state": "running"}) as (others, _):
        assert until(lambda: others.trouble(lambda ranks: NEVER)) == "lost"
        assert "it has not reached 127.0.0.1 over the network for " in others.lost[0].why


def test_a_launcher_that_was_started_anew_has_lost_its_ranks(on_two_hosts: RunDir) -> None:
    with gathered(on_two_hosts, run={"state": "running", "pid": 8}) as (others, _):
        assert until(lambda: others.trouble(lambda ranks: time.monotonic())) == "lost"
        assert others.lost[0].why == "its launcher was started anew"


def test_workers_that_end_badly_elsewhere_end_the_start(on_two_hosts: RunDir) -> None:
    death = {"rank": 1, "signal": 9, "host": "b", "log": "l"}
    ended = {"state": "ended", "reaches": True, "code": 1, "deaths": (Death(**death),)}
    with gathered(on_two_hosts, run=ended) as (others, _):
        assert until(lambda: others.trouble(lambda ranks: NEVER)) == "ended"
        others.settle(at_once=False)
        assert (others.code, others.deaths, others.lost) == (1, [Death(**death)], [])


def test_a_torchrun_that_was_killed_elsewhere_is_not_taken_for_the_one_here(
    on_two_hosts: RunDir,
) -> None:
    death = {"rank": None, "signal": 9, "host": "b", "log": "l"}
    ended = {"state": "ended", "reaches": True, "code": -9, "deaths": (Death(**death),)}
    (on_two_hosts.logs / "stderr.log").write_text("")
    with gathered(on_two_hosts, run=ended) as (others, _):
        assert until(lambda: others.trouble(lambda ranks: NEVER)) == "ended"
        log, told = on_two_hosts.logs / "stderr.log", tuple(others.deaths)
        ending = Ending(code=others.code, world_size=2, log=log, log_from=0, beats=(), deaths=told)
    found = explain(on_two_hosts, ending)
    assert (found.cause, found.host) == ("lost_rank", "b")
    assert str(found.error) == "torchrun on b was killed by SIGKILL; see l"


def test_a_hang_is_examined_on_all_hosts(on_two_hosts: RunDir) -> None:
    found = {"state": "examined", "reaches": True, "stopped": (1,), "busy": {"1": "f.py:3"}}
    with gathered(on_two_hosts, examine=found) as (others, _):
        assert others.examine() == ([1], {1: "f.py:3"})
        assert others.lost == []


def test_a_host_that_is_found_cut_off_by_a_hang_is_lost(on_two_hosts: RunDir) -> None:
    with gathered(on_two_hosts, examine={"state": "examined"}) as (others, _):
        others.examine()
        assert others.lost[0].why == "it does not reach 127.0.0.1 over the network"


def test_settling_stops_who_goes_on_and_loses_who_does_not_answer(
    on_two_hosts: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.supervise.others._BY_THEMSELVES_S", 5.0)
    with gathered(on_two_hosts, stop={"state": "ended"}) as (others, _):
        others.settle(at_once=True)
        assert (others.lost, others.code) == ([], 0)
    with gathered(on_two_hosts) as (others, b):
        b.close()
        others.settle(at_once=True)
        assert [lost.host for lost in others.lost] == ["b"]


def test_all_hear_how_the_run_ended(on_two_hosts: RunDir) -> None:
    reader = Reader(order_file(on_two_hosts), Order, now=0)
    with lead(on_two_hosts) as others:
        others.exit_code = 130
    order = reader.look(1)
    assert order is not None and (order.act, order.exit_code) == ("end", 130)
    with pytest.raises(LostRankError), lead(on_two_hosts):
        raise LostRankError("gone")
    order = reader.look(2)
    assert order is not None and (order.act, order.exit_code) == ("end", 12)
