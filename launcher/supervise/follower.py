"""The launcher of every host but the first: does what that one orders, and tells how it goes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from launcher import heartbeat
from launcher.cluster import network
from launcher.errors import BY_EXIT_CODE, FINISHED, LauncherError, LostRankError
from launcher.output import print_line
from launcher.run_dir import RunDir, lock
from launcher.submit import hosts
from launcher.supervise import health, memory, processes
from launcher.supervise.failure import deaths
from launcher.supervise.notes import BEAT_S, Order, Post, Reader, Report, order_file, report_file
from launcher.supervise.start import Workers, command_on_hosts, spawn
from launcher.supervise.stop_requests import EXIT_CODES, StopRequests, handling

_LOOK_S = 0.2


def follow(run: RunDir, *, node: int, quiet_stdout: bool) -> int:
    """Run the ranks of host number `node` as the first host says, until it sends us home.

    Return 0, 129, 130 or 143; raise where the run failed, or the first host stays away.
    """
    # A connection of ssh that breaks hangs up on us; that is no wish of a person, and the other hosts are well.
    requests = StopRequests(run=run, only_here=frozenset({signal.SIGHUP}))
    processes.end_orphans(run)  # of a launcher that was killed: they are in nobody's care
    descriptor = lock(run, node=node)
    report = Report(host=socket.gethostname(), pid=os.getpid())
    try:
        with handling(requests), Post(report_file(run, node), report) as post:
            follower = _Follower(
                run=run, node=node, requests=requests, quiet_stdout=quiet_stdout, lock=descriptor, post=post
            )
            try:
                return follower.work()
            finally:
                follower.stop()
    finally:
        os.close(descriptor)


@dataclass
class _Follower:
    """One host's part of a run."""

    run: RunDir
    node: int
    requests: StopRequests
    quiet_stdout: bool
    lock: int
    post: Post[Report]
    _workers: Workers | None = None
    _kills: int = 0  # of the kernel, for memory, before the start under way
    _tried: float = 0.0  # when the first host was last knocked at
    _asked: float = 0.0  # when devices were last asked for

    def work(self) -> int:
        """Obey until the order to leave."""
        reader = Reader(order_file(self.run), Order, now=time.monotonic())
        policy = self.run.job().supervise
        while True:
            order = reader.look(time.monotonic())
            silent_s = time.monotonic() - reader.changed
            if order is not None and order.act == "end":
                return self._leave(order)
            if silent_s > policy.host_timeout_s and self._workers is not None:
                self._tell(f"no word from the first host for {silent_s:.0f} s; its ranks here are ended")
                self.stop()
                self._say(state="waiting")
            elif order is not None and silent_s <= policy.host_timeout_s:
                self._obey(order)
            nobody_leads = self._workers is None and silent_s > 2 * BEAT_S
            if self.requests.leaves or (nobody_leads and self.requests.received is not None):
                return self.requests.exit_code
            if silent_s > policy.host_wait_s:
                raise LostRankError(
                    f"the first host of {self.run.path} did not report for supervise.host_wait_s="
                    f"{policy.host_wait_s:g} s; start its launcher, then this one"
                )
            self._look()
            time.sleep(_LOOK_S)

    def stop(self) -> None:
        """End the workers of this host at once, if there are any."""
        workers, self._workers = self._workers, None
        self.requests.process = None
        if workers is not None:
            workers.process.kill()
            workers.process.wait()
            processes.end(self.run)

    # ---- orders ------------------------------------------------------------------------------------------------

    def _obey(self, order: Order) -> None:
        """Take the step towards what is wanted that is left; a start that we did not gather for is not ours."""
        report = self.post.note
        if order.act == "gather":
            self._gather(order.start)
        elif order.start != report.start:
            return
        elif order.act == "run" and report.state == "gathered":
            self._start()
        elif order.act == "examine" and report.state == "running":
            self._examine()
        elif order.act == "stop" and report.state != "ended":
            self.stop()
            self._say(state="ended")

    def _gather(self, start: int) -> None:
        """Stand ready for a start, and ask now and then after devices that are missing."""
        report, job = self.post.note, self.run.job()
        is_new = (report.start, report.state) != (start, "gathered")
        if is_new:
            self.stop()
            report = Report(
                host=report.host, pid=report.pid, reaches=report.reaches, start=start, state="gathered"
            )
        is_short = report.devices is not None and report.devices < job.cluster.gpus_per_node
        if is_new or (is_short and time.monotonic() - self._asked > job.supervise.health_interval_s):
            devices, self._asked = health.devices(job), time.monotonic()
            self.post.put(replace(report, devices=devices))

    def _start(self) -> None:
        command, environment = command_on_hosts(self.run, node=self.node)
        self._kills = memory.kills()
        self._workers = spawn(
            self.run,
            self.requests,
            command,
            environment=environment,
            quiet_stdout=self.quiet_stdout,
            lock=self.lock,
            node=self.node,
        )
        self._say(state="running")

    def _examine(self) -> None:
        per_host, world_size = self.run.job().cluster.gpus_per_node, self.run.plan().world_size
        own = range(self.node * per_host, (self.node + 1) * per_host)
        beats = [b for b in heartbeat.read_all(self.run.heartbeats, world_size=world_size) if b.rank in own]
        stopped = tuple(processes.stopped(beats))
        processes.dump_flight_recorder(self.run, [beat.rank for beat in beats])
        busy = {str(rank): line for rank, line in processes.dump_stacks(self.run, beats).items()}
        self._knock()
        self._say(state="examined", stopped=stopped, busy=busy)

    def _leave(self, order: Order) -> int:
        if order.exit_code != FINISHED and order.exit_code not in EXIT_CODES.values():
            kind = BY_EXIT_CODE.get(order.exit_code, LauncherError)
            raise kind(
                f"the run ended on its first host with exit code {order.exit_code}; see {self.run.path}"
            )
        return order.exit_code

    # ---- looking -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Notice an end of the workers, and try the way to the first host now and then."""
        if self._workers is not None and self._workers.process.poll() is not None:
            self._tell_end(self._workers)
        if time.monotonic() - self._tried > BEAT_S:
            self._knock()

    def _tell_end(self, workers: Workers) -> None:
        self._workers = self.requests.process = None
        code = workers.process.returncode
        if code != 0:
            processes.end(self.run)
        found = deaths(
            code, log=workers.log, log_from=workers.log_from, out_of_memory=memory.kills() > self._kills
        )
        self._say(state="ended", code=code, deaths=tuple(found))

    def _knock(self) -> None:
        job, self._tried = self.run.job(), time.monotonic()
        first = hosts.address(hosts.of_run(self.run)[0])
        reaches = network.answers(first, hosts.port_of(self.run.path, job) + 1)
        if reaches != self.post.note.reaches:
            self._say(reaches=reaches)

    def _say(self, **changes: Any) -> None:
        self.post.put(replace(self.post.note, **changes))

    def _tell(self, sentence: str) -> None:
        with suppress(LauncherError):
            print_line(f"meshwright: {sentence}", sys.stderr)
