"""Start the workers of a frozen run again and again until it is finished, somebody stops it, or it is no use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import LauncherError, LostRankError
from launcher.output import print_line
from launcher.run_dir import RunDir, lock
from launcher.supervise import memory, remedy
from launcher.supervise.devices import Devices
from launcher.supervise.failure import Failure, explain
from launcher.supervise.ladder import Change
from launcher.supervise.others import Others, lead
from launcher.supervise.policy import Attempt, decide, failed_alike
from launcher.supervise.start import Ending, start
from launcher.supervise.stop_requests import StopRequests, handling
from launcher.supervise.told import log_failure
from launcher.supervise.watch import step_reached


def run_workers(run: RunDir, *, quiet_stdout: bool, export: Path | None = None) -> int:
    """Run the workers, to train or to export, through failures that another start can mend, and lead other hosts.

    Return 0, 129, 130 or 143; raise what the last start died of.
    """
    requests = StopRequests(run=run, exporting=export is not None)
    descriptor = lock(run)
    try:
        run.stop_file.unlink(missing_ok=True)  # of an earlier day; from now on it is meant for us
        with handling(requests), lead(run) as others:
            supervisor = _Supervisor(
                run=run, requests=requests, quiet_stdout=quiet_stdout, lock=descriptor, others=others
            )
            others.exit_code = supervisor.train() if export is None else supervisor.export(export)
            return others.exit_code
    finally:
        os.close(descriptor)


@dataclass
class _Supervisor:
    """One launcher's care for one run."""

    run: RunDir
    requests: StopRequests
    quiet_stdout: bool
    lock: int
    others: Others
    attempts: list[Attempt] = field(default_factory=list)  # that failed
    furthest: int = 0  # steps completed by any start

    def export(self, folder: Path) -> int:
        """Start the workers once to write the weights; what they die of is the answer."""
        ending, failure = self._start(export=folder, on_look=lambda: None)
        if self.requests.received is not None:
            return self.requests.exit_code
        if failure is None:
            return 0
        log_failure(self.run, failure, step=step_reached(ending.beats), event="export_failed")
        raise failure.error

    def train(self) -> int:
        """Start the workers until they end well, or until another start is of no use."""
        devices = Devices(run=self.run, requests=self.requests)
        while True:
            if not devices.prepare() or not self._gather():
                return self._interrupted()
            checkpoint = self._newest_checkpoint()
            ending, failure = self._start(export=None, on_look=devices.look)
            if self._ends_on_request(failure):
                return self._interrupted()
            if failure is not None and failure.cause == "lost_node" and self._is_finished():
                return 0  # it went when all was done
            if failure is not None:
                log_failure(self.run, failure, step=step_reached(ending.beats))
                self._take_in(failure, ending, checkpoint)
            elif not devices.are_back or self._is_finished():
                return 0

    def _gather(self) -> bool:
        """Wait for the other hosts; one that never comes is how the run ends, so the run tells of it."""
        try:
            return self.others.gather(self.requests)
        except LostRankError as error:
            log_failure(self.run, Failure(cause="lost_node", error=error), step=None)
            raise

    def _start(self, *, export: Path | None, on_look: Callable[[], None]) -> tuple[Ending, Failure | None]:
        kills = memory.kills()
        ending = start(
            self.run,
            self.requests,
            quiet_stdout=self.quiet_stdout,
            export=export,
            lock=self.lock,
            on_look=on_look,
            others=self.others,
        )
        if ending.code == 0:
            return ending, None
        return ending, explain(self.run, ending, out_of_memory_kills=memory.kills() - kills)

    def _ends_on_request(self, failure: Failure | None) -> bool:
        # One request that ends in a fault is a fault: the checkpoint it promised may be missing.
        asked = self.requests.received is not None and (failure is None or self.requests.count > 1)
        return asked and not self._is_finished()

    def _is_finished(self) -> bool:
        return next((e["event"] for e in reversed(list(self.run.events()))), None) == "finished"

    def _interrupted(self) -> int:
        received = self.requests.received
        self.run.stop_file.unlink(missing_ok=True)
        self.run.log_event("interrupted", signal=None if received is None else received.name)
        return self.requests.exit_code

    def _take_in(self, failure: Failure, ending: Ending, checkpoint: str | None) -> None:
        """Remedy the failure where that is allowed, and wait for the next start; raise where there is none."""
        reached = step_reached(ending.beats)
        progressed = reached > self.furthest or self._newest_checkpoint() != checkpoint
        self.furthest = max(self.furthest, reached)
        if self.requests.asked():
            raise failure.error  # also where a start would help: this run is to end
        change = remedy.after_failure(
            self.run,
            failure,
            step=reached,
            failed_before=0 if progressed else failed_alike(self.attempts, failure.cause),
        )
        self.attempts.append(Attempt(cause=failure.cause, progressed=progressed, remedied=change is not None))
        self.requests.sleep(self._next_start(failure, change))
        if self.requests.received is None and self.requests.asked():
            raise failure.error

    def _next_start(self, failure: Failure, change: Change | None) -> float:
        """Return the seconds until the next start, and tell about it; raise where there is none."""
        policy = self.run.job().supervise
        decision = decide(policy, self.attempts)
        if not decision.again:
            raise _final(failure.error, self.run, decision.why)
        checkpoint = self._newest_checkpoint()
        self.run.log_event(
            "restarting",
            cause=failure.cause,
            rank=failure.rank,
            host=failure.host,
            step=self.furthest,
            checkpoint=checkpoint,
            remedy=None if change is None else change.step,
            delay_s=decision.delay_s,
            number=len(self.attempts),
        )
        what = f" with {' '.join(change.words) or 'another plan'}" if change is not None else ""
        when = f" in {decision.delay_s:g} s" if decision.delay_s else ""
        print_line(
            f"meshwright: {failure.error}; starting again{when}{what} from {checkpoint or 'the beginning'} "
            f"(restart {len(self.attempts)} of {policy.max_restarts})",
            sys.stderr,
        )
        return decision.delay_s

    def _newest_checkpoint(self) -> str | None:
        found = self.run.tiers(self.run.job().checkpoint).committed()
        return found[0].name if found else None


def _final(error: LauncherError, run: RunDir, why: str) -> LauncherError:
    """Add why the run ends here; a fault that says itself what to do stays as it is."""
    if not why:
        return error
    job, again = run.job(), f"resume {run.path}`"
    if job.cluster.num_nodes > 1:
        again = f"submit {run.path}`" + (" on each host" if job.submit.name == "torchrun" else "")
    return type(error)(
        f"{error}; not started again: {why}; `meshwright {again} goes on from the last good checkpoint"
    )
