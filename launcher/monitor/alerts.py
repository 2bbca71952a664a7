"""A run that raises its voice: rules over its steps, a watch for steps that do not come, each cause told once.

Where to is a secret and comes from the environment alone: MESHWRIGHT_WEBHOOK_URL, a Slack webhook or anything that
takes a JSON object. It is never frozen, printed or logged.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.files import append_record, read_records
from launcher.monitor.config import AlertConfig
from launcher.monitor.metrics import StepMetrics
from launcher.monitor.reliability import cause_of

WEBHOOK = "MESHWRIGHT_WEBHOOK_URL"
STALLED, SLOWDOWN, STRAGGLER, CHECKPOINT, GOODPUT = (
    "stalled",
    "slowdown",
    "straggler",
    "checkpoint_age",
    "low_goodput",
)
_SETTLED = 20  # steps of this start before speed is judged
_IN_A_ROW = 3  # samples that have to agree before a rank is called slow
_PATIENCE_S = 10  # for a webhook to answer
_log = logging.getLogger(__name__)


class Outbox:
    """Tells each cause once: metrics/alerts.jsonl, the webhook and whoever else listens."""

    def __init__(
        self, directory: Path, *, repeat_s: float, announce: Callable[[str, str], None] | None = None
    ) -> None:
        self._file = directory / "alerts.jsonl"
        self._run = directory.absolute().parent.name
        self._repeat_s = repeat_s
        self._announce = announce
        self._told: dict[str, float] = {}  # by us and when, for a disk that keeps nothing

    def told(self) -> list[dict[str, Any]]:
        """Everything told so far, over all starts; lines that a full disk has torn are left out."""
        return list(read_records(self._file))

    def tell(self, cause: str, text: str, *, step: int | None) -> bool:
        """Tell one cause, unless that was done lately; say whether it was told now.

        A full disk raises only after everybody has heard of it.
        """
        now = time.time()
        told = [(past["cause"], past["time"]) for past in self.told()]
        if any(past == cause and now - then < self._repeat_s for past, then in [*told, *self._told.items()]):
            return False
        self._told[cause] = now
        record = {"time": now, "run": self._run, "cause": cause, "step": step, "text": text}
        try:
            append_record(self._file, record)
        finally:
            post(record)
            if self._announce is not None:
                self._announce(cause, text)
        return True


class Alerts:
    """The rules over finished steps, as a sink among others. Rank 0 only."""

    def __init__(self, config: AlertConfig, *, outbox: Outbox) -> None:
        self._config, self._outbox = config, outbox
        self._opened = time.monotonic()
        self._seen = 0
        self._slow_samples: dict[str, int] = {}
        self._newest: StepMetrics | None = None
        self._newest_at = 0.0
        self._faults: set[str] = set()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, name="meshwright-alerts", daemon=True)
        self._watch.start()

    def write(self, metrics: StepMetrics) -> None:
        """Take a finished step; what it gives rise to is told by the watching thread, so that no step waits."""
        self._seen += 1
        for rank, score in (metrics.straggler_score or {}).items():
            slow = 0 < self._config.straggler < score
            self._slow_samples[rank] = self._slow_samples.get(rank, 0) + 1 if slow else 0
        self._newest, self._newest_at = metrics, time.monotonic()

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Look a last time, and stop watching."""
        self._done.set()
        self._watch.join(timeout=_PATIENCE_S + 1)

    def _look(self) -> None:
        over = False
        while not over:
            over = self._done.wait(0.5)
            try:
                self._judge()
            except Exception as error:
                # Whatever a rule meets: the others, and later steps, are still watched.
                self._say_once("the alerts' rules failed", error)

    def _judge(self) -> None:
        newest, waited_s = self._newest, time.monotonic() - self._newest_at
        if newest is None:
            return  # nothing is known before the first step
        found = list(self._causes(newest))
        if not self._done.is_set() and (text := self._stalled(newest, waited_s)):
            found.append((STALLED, text))
        for cause, text in found:
            try:
                if self._outbox.tell(cause, text, step=newest.step):
                    _log.warning("alert %s: %s", cause, text)
            except Exception as error:  # a full disk, a damaged file, whoever else listens
                self._say_once(f"alert {cause} could not be told", error)

    def _say_once(self, what: str, error: Exception) -> None:
        """One line however often we look: a service's own words may hold its key, so they are not repeated."""
        reason = error.strerror if isinstance(error, OSError) else None
        said = f"{what}: {reason or type(error).__name__}"
        if said not in self._faults:
            self._faults.add(said)
            _log.warning("%s", said)

    def _stalled(self, newest: StepMetrics, waited_s: float) -> str | None:
        config, usual_s = self._config, newest.step_time_p99_s or newest.step_time_s
        if not config.stalled_factor or waited_s < max(
            config.stalled_least_s, config.stalled_factor * usual_s
        ):
            return None
        return f"no step for {waited_s:.0f} s after step {newest.step}, where 99 of 100 take less than {usual_s:.3g} s"

    def _causes(self, newest: StepMetrics) -> Iterator[tuple[str, str]]:
        """Yield what is wrong at this step, as cause and sentence."""
        config = self._config
        recent, usual = newest.step_time_recent_s, newest.step_time_p50_s
        if (
            config.slowdown
            and recent
            and usual
            and self._seen >= _SETTLED
            and recent > config.slowdown * usual
        ):
            yield (
                SLOWDOWN,
                f"steps take {recent:.3g} s at step {newest.step}, where the run's median is {usual:.3g} s",
            )
        slow = dict(self._slow_samples)  # the training thread may add a rank at this moment
        rank = max(slow, key=lambda name: slow[name], default="")
        if rank and slow[rank] >= _IN_A_ROW:
            yield (
                STRAGGLER,
                f"rank {rank} computes more than {config.straggler:g} times as long as the others",
            )
        age = newest.checkpoint_age_s
        if config.checkpoint_age_s and age is not None and age > config.checkpoint_age_s:
            yield CHECKPOINT, f"the newest checkpoint is {age:.0f} s old at step {newest.step}"
        judged = time.monotonic() - self._opened >= config.goodput_after_s
        if judged and newest.goodput is not None and newest.goodput < config.least_goodput:
            yield GOODPUT, f"{newest.goodput:.0%} of the time since the start went into steps that count"


def tell_failure(directory: Path, event: Mapping[str, Any], *, repeat_s: float) -> None:
    """Tell that the workers failed, by the event that says so; what goes wrong with it must not hide the failure."""
    try:
        Outbox(directory, repeat_s=repeat_s).tell(
            cause_of(event), str(event.get("message", "")), step=event.get("step")
        )
    except OSError as error:
        _log.warning("the alert could not be kept: %s", error.strerror)


def post(record: Mapping[str, Any]) -> bool:
    """Send one alert to the webhook; say whether somebody took it. No address, no message."""
    address = os.environ.get(WEBHOOK)
    if not address:
        return False
    try:
        urllib.request.urlopen(_request(address, record), timeout=_PATIENCE_S).close()
    except Exception as error:  # whatever it is, its own words may hold the address
        _log.warning("%s did not take the alert: %s", WEBHOOK, _reason(error))
        return False
    return True


def _request(address: str, record: Mapping[str, Any]) -> urllib.request.Request:
    where = urlsplit(address)
    if where.scheme not in ("http", "https") or not where.hostname or where.port == 0:
        raise ValueError  # as `port` does where it is none
    text = f"{record['run']}: {record['text']}"
    # Slack takes a text and nothing else.
    body = {"text": text} if where.hostname == "hooks.slack.com" else {**record, "text": text}
    return urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"it answered {error.code}"
    if isinstance(error, ValueError):
        return "it is not an address that begins with http:// or https://"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return cause.strerror or "no answer" if isinstance(cause, OSError) and cause.strerror else "no answer"
