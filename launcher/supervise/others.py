"""The other hosts of a run, as the first one's launcher leads them: told what to do, watched, and found missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from launcher.cluster.network import Door
from launcher.errors import LauncherError, LostRankError, TrainingError
from launcher.output import print_line
from launcher.run_dir import RunDir
from launcher.submit import hosts
from launcher.supervise.notes import (
    Act,
    Death,
    Order,
    Post,
    Reader,
    Report,
    order_file,
    report_file,
)
from launcher.supervise.stop_requests import StopRequests

_LOOK_S = 0.2
_BY_THEMSELVES_S = 60.0  # torchrun kills after 30 s whom it has asked to leave
_EXAMINED_S = 10.0
_SILENTLY_S = 5.0  # launchers come one after the other; only then a person is told who is awaited


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A host that went away during a start."""

    host: str
    ranks: range
    why: str


class _Host:
    """One other host: its launcher's reports, and when it was last heard and last reached the first host."""

    def __init__(self, run: RunDir, node: int, *, names: Sequence[str], per_host: int, now: float) -> None:
        self.name, self._first = names[node], hosts.address(names[0])
        self.ranks = range(node * per_host, (node + 1) * per_host)
        self.reached = now
        self.lost: Lost | None = None
        self._reader: Reader[Report] = Reader(report_file(run, node), Report, now=now)
        self._pid: int | None = None  # of the launcher that gathered for this start

    def look(self, now: float) -> Report | None:
        report = self._reader.look(now)
        if report is not None and report.reaches:
            self.reached = max(self.reached, self._reader.changed)
        return report

    def absence(self, start: int, *, now: float, limit_s: float) -> str | None:
        """Return why a start has to wait for this host; None where it stands ready."""
        report = self.look(now)
        if report is None or now - self._reader.changed > limit_s:
            return f"no launcher answers on {self.name}"
        if (report.start, report.state) != (start, "gathered"):
            return f"{report.host} is not ready yet"
        if not report.reaches:
            return f"{report.host} cannot reach {self._first} over the network"
        if report.devices is not None and report.devices < len(self.ranks):
            return f"{report.host} has {report.devices} sound devices of {len(self.ranks)}"
        self._pid, self.lost = report.pid, None
        return None

    def missing(self, now: float, *, limit_s: float, quiet_s: float) -> Lost | None:
        """Return this host as lost where it has gone; `quiet_s` is how long none of its ranks has stirred."""
        report = self.look(now)
        if self.lost is None and report is not None:
            silent_s, cut_s = now - self._reader.changed, now - self.reached
            if report.pid != self._pid:
                self._lose("its launcher was started anew")
            elif min(silent_s, quiet_s) > limit_s:
                self._lose(f"no word from its launcher for {silent_s:.1f} s")
            elif min(cut_s, quiet_s) > limit_s:
                self._lose(f"it has not reached {self._first} over the network for {cut_s:.1f} s")
        return self.lost

    def cut_off(self) -> None:
        """Take it for lost where it said last that it does not reach the first host."""
        report = self._reader.note
        if self.lost is None and report is not None and not report.reaches:
            self._lose(f"it does not reach {self._first} over the network")

    def _lose(self, why: str) -> None:
        report = self._reader.note
        self.lost = Lost(host=self.name if report is None else report.host, ranks=self.ranks, why=why)

    def ended(self, start: int) -> Report | None:
        report = self._reader.note
        return report if report is not None and (report.start, report.state) == (start, "ended") else None


class Others:
    """The other hosts together; where there are none, nothing is waited for."""

    def __init__(self, run: RunDir, names: Sequence[str], *, post: Post[Order] | None, now: float) -> None:
        job = run.job()
        self._run, self._post = run, post
        self._limit_s, self._patience_s = job.supervise.host_timeout_s, job.supervise.host_wait_s
        self._hosts = [
            _Host(run, node, names=names, per_host=job.cluster.gpus_per_node, now=now)
            for node in range(1, len(names))
        ]
        self.own_ranks = range(job.cluster.gpus_per_node)
        self.exit_code = LauncherError.exit_code  # of the run, until somebody knows better

    # ---- before a start ----------------------------------------------------------------------------------------

    def gather(self, requests: StopRequests) -> bool:
        """Wait until all hosts stand ready; False where somebody stops the run, LostRankError where one never comes."""
        self._order("gather", start=self._start + 1)
        begun, told = time.monotonic(), False
        while not requests.asked():
            now = time.monotonic()
            absent = [
                why
                for host in self._hosts
                if (why := host.absence(self._start, now=now, limit_s=self._limit_s)) is not None
            ]
            if not absent:
                return True
            if now - begun > self._patience_s:
                raise LostRankError(
                    f"{absent[0]}, after supervise.host_wait_s={self._patience_s:g} s; bring it back, then "
                    f"`meshwright submit {self._run.path}` on each host"
                )
            if now - begun > _SILENTLY_S and not told:
                told = True
                self._run.log_event("paused", hosts=absent)
                print_line(f"meshwright: {'; '.join(absent)}; waiting", sys.stderr)
            time.sleep(_LOOK_S)
        return False

    # ---- during one --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Have them start their ranks."""
        self._order("run")

    def trouble(self, last_beat: Callable[[range], float]) -> Literal["lost", "ended"] | None:
        """Tell whether this start is over elsewhere: a host is lost, or its workers ended badly."""
        now = time.monotonic()
        for host in self._hosts:
            if host.missing(now, limit_s=self._limit_s, quiet_s=now - last_beat(host.ranks)):
                return "lost"
        return "ended" if any(report.code for report in self._ended()) else None

    def examine(self) -> tuple[list[int], dict[int, str]]:
        """Have them look at ranks that stand still; return which are stopped, and which are outside of PyTorch."""
        self._order("examine")
        until = time.monotonic() + _EXAMINED_S
        reports = self._looks()
        while time.monotonic() < until and any(
            report is None or report.state not in ("examined", "ended") for report in reports
        ):
            time.sleep(_LOOK_S)
            reports = self._looks()
        for host in self._hosts:
            host.cut_off()
        examined = [report for report in reports if report is not None and report.state == "examined"]
        stopped = [rank for report in examined for rank in report.stopped]
        return stopped, {int(rank): line for report in examined for rank, line in report.busy.items()}

    # ---- after one ---------------------------------------------------------------------------------------------

    def settle(self, *, at_once: bool) -> None:
        """Wait until their ranks have ended: by themselves first, unless `at_once`; a host that is silent is lost."""
        if not at_once:
            self._wait_for_ends(_BY_THEMSELVES_S)
        self._order("stop")
        self._wait_for_ends(_BY_THEMSELVES_S)

    def end(self) -> None:
        """Send them home."""
        self._order("end")

    @property
    def lost(self) -> list[Lost]:
        """Hosts that this start has lost."""
        return [host.lost for host in self._hosts if host.lost is not None]

    @property
    def code(self) -> int:
        """The first exit code of theirs that is not 0; a signal is none of ours, `deaths` tell of it."""
        failed = next((report.code for report in self._ended() if report.code), 0)
        return TrainingError.exit_code if failed < 0 else failed

    @property
    def deaths(self) -> list[Death]:
        """What signals ended there."""
        return [death for report in self._ended() for death in report.deaths]

    # ---- helpers -----------------------------------------------------------------------------------------------

    @property
    def _start(self) -> int:
        return 0 if self._post is None else self._post.note.start

    def _order(self, act: Act, *, start: int | None = None) -> None:
        if self._post is not None:
            number = self._start if start is None else start
            self._post.put(Order(start=number, act=act, exit_code=self.exit_code))

    def _looks(self) -> list[Report | None]:
        return [host.look(time.monotonic()) for host in self._hosts if host.lost is None]

    def _ended(self) -> Iterator[Report]:
        return (report for host in self._hosts if (report := host.ended(self._start)) is not None)

    def _wait_for_ends(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        left = [host for host in self._hosts if host.lost is None]
        while left and (now := time.monotonic()) < until:
            for host in left:
                # The ranks here are gone: nobody there can stir any more.
                host.missing(now, limit_s=self._limit_s, quiet_s=float("inf"))
            left = [host for host in left if host.lost is None and host.ended(self._start) is None]
            time.sleep(_LOOK_S if left else 0)


@contextmanager
def lead(run: RunDir) -> Iterator[Others]:
    """Lead the other hosts of a run, if it has any, and send them home in the end."""
    job, now = run.job(), time.monotonic()
    if job.cluster.num_nodes == 1:
        yield Others(run, (), post=None, now=now)
        return
    names = hosts.of_run(run)
    before = Reader(order_file(run), Order, now=now).last_start()
    with ExitStack() as stack:
        stack.enter_context(Door(hosts.port_of(run.path, job) + 1))
        post = stack.enter_context(Post(order_file(run), Order(start=before, act="stop")))
        others = Others(run, names, post=post, now=now)
        try:
            yield others
        except LauncherError as error:
            others.exit_code = error.exit_code
            raise
        finally:
            others.end()
