"""Devices that are missing: wait for them, or train on fewer ranks until they are back."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

from launcher.errors import LauncherError
from launcher.output import print_line
from launcher.run_dir import RunDir
from launcher.supervise import health, remedy
from launcher.supervise.stop_requests import StopRequests


@dataclass
class Devices:
    """What this host can train on, asked before every start and, while it is less than planned, during one."""

    run: RunDir
    requests: StopRequests
    given: str | None = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    are_back: bool = False  # the workers were asked to leave because devices are back
    _missing: bool = False  # fewer ranks train than the run was planned for
    _asked: float = 0.0

    def prepare(self) -> bool:
        """Return True once the frozen plan, perhaps another than before, can run; False when somebody stops the run."""
        self.run.leave_file.unlink(missing_ok=True)  # also of a launcher that was killed
        self.are_back = False
        interval, paused = self.run.job().supervise.health_interval_s, False
        while not self.requests.asked():
            found = self._count()
            if found is None or self._fits(found):
                self._missing = self._planned() < remedy.whole(self.run).devices
                return True
            if not paused:
                self._tell_of_pause(found, interval)
            paused = True
            self.requests.sleep(interval)
        return False

    def look(self) -> None:
        """Ask now and then while devices are missing, and have the workers leave when they are back."""
        if not self._missing or self.are_back or self.requests.asked():
            return
        if time.monotonic() - self._asked < self.run.job().supervise.health_interval_s:
            return
        # The workers are well: no answer about devices is a reason to leave them.
        with suppress(LauncherError, OSError):
            found = self._count()
            if found is not None and found >= remedy.whole(self.run).devices:
                self.run.leave_file.touch()  # a checkpoint, and then all ranks
                self.are_back = True

    def _planned(self) -> int:
        return self.run.job().cluster.gpus_per_node

    def _count(self) -> int | None:
        self._asked = time.monotonic()
        return health.devices(self.run.job(), given=self.given)

    def _fits(self, found: int) -> bool:
        """Make the plan fit the devices, if need be and if it may."""
        wanted = remedy.whole(self.run).devices
        planned, usable = self._planned(), min(found, wanted)
        if planned == usable:
            return True
        if usable < planned and not (self.run.job().supervise.elastic and usable > 0):
            return False
        changed = remedy.for_devices(self.run, usable)
        if changed:
            self._tell_of_plan(found, wanted)
        return changed or planned < usable

    def _tell_of_pause(self, found: int, interval: float) -> None:
        wanted = remedy.whole(self.run).devices
        self.run.log_event("paused", devices=found, wanted=wanted)
        print_line(
            f"meshwright: {found} of {wanted} devices can be used; waiting for them, asking every "
            f"supervise.health_interval_s={interval:g} s",
            sys.stderr,
        )

    def _tell_of_plan(self, found: int, wanted: int) -> None:
        plan = self.run.plan()
        print_line(
            f"meshwright: {found} of {wanted} devices can be used; going on with {plan.world_size} ranks "
            f"(dp={plan.dp} micro_batch_size={plan.micro_batch_size} num_microbatches={plan.num_microbatches})",
            sys.stderr,
        )
