"""Alerts: each rule by steps that break it, each cause once at a real webhook, the address in no word of ours."""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.monitor import alerts as alerts_module
from launcher.monitor.alerts import Alerts, Outbox, post, tell_failure
from launcher.monitor.config import AlertConfig

QUIET = AlertConfig(stalled_factor=0, slowdown=0, straggler=0, least_goodput=0)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    return Outbox(tmp_path / "run" / "metrics", repeat_s=3600)


def causes(outbox: Outbox) -> list[str]:
    return [told["cause"] for told in outbox.told()]


def run(
    config: AlertConfig, outbox: Outbox, steps: list[Any], *, until: Callable[[], bool] = lambda: True
) -> None:
    alerts = Alerts(config, outbox=outbox)
    for metrics in steps:
        alerts.write(metrics)
    deadline = time.monotonic() + 20
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
    alerts.close()


def test_a_healthy_run_is_quiet(outbox: Outbox, steps: SimpleNamespace, webhook: Any) -> None:
    calm = {"step_time_recent_s": 0.12, "step_time_p50_s": 0.11, "step_time_p99_s": 0.2}
    scores = {"0": 0.9, "1": 1.1}
    run(
        AlertConfig(),
        outbox,
        [steps.at(s, straggler_score=scores, goodput=0.1, **calm) for s in range(1, 40)],
    )
    assert outbox.told() == webhook.taken == []


@pytest.mark.parametrize(
    ("config", "figures", "cause"),
    [
        (AlertConfig(stalled_factor=0), {"step_time_recent_s": 0.4, "step_time_p50_s": 0.2}, "slowdown"),
        (AlertConfig(slowdown=0), {"straggler_score": {"0": 0.5, "1": 2.0}}, "straggler"),
        (AlertConfig(checkpoint_age_s=60), {"checkpoint_age_s": 61.0}, "checkpoint_age"),
        (AlertConfig(goodput_after_s=0), {"goodput": 0.4}, "low_goodput"),
    ],
)
def test_a_broken_rule_is_told_once(
    outbox: Outbox,
    steps: SimpleNamespace,
    webhook: Any,
    config: AlertConfig,
    figures: dict[str, Any],
    cause: str,
) -> None:
    run(config, outbox, [steps.at(step, **figures) for step in range(1, 26)])
    run(config, outbox, [steps.at(step, **figures) for step in range(20, 45)])  # after a restart
    assert causes(outbox) == [cause]
    (taken,) = webhook.taken
    assert (taken["cause"], taken["run"]) == (cause, "run")
    assert taken["text"].startswith("run: ")


def test_one_slow_sample_is_no_straggler(outbox: Outbox, steps: SimpleNamespace) -> None:
    slow, even = {"0": 0.5, "1": 2.0}, {"0": 1.0, "1": 1.0}
    run(
        AlertConfig(),
        outbox,
        [steps.at(s, straggler_score=even if s % 3 == 0 else slow) for s in range(1, 20)],
    )
    assert causes(outbox) == []


def test_a_step_that_does_not_come_is_told_while_it_does_not(
    outbox: Outbox, steps: SimpleNamespace, webhook: Any
) -> None:
    config = AlertConfig(stalled_least_s=0.6, stalled_factor=2)
    run(config, outbox, [steps.at(7, step_time_p99_s=0.2)], until=lambda: bool(webhook.taken))
    (taken,) = webhook.taken
    assert (taken["cause"], taken["step"]) == ("stalled", 7)
    assert "after step 7" in taken["text"]


def test_a_run_that_closes_is_not_stalled(outbox: Outbox, steps: SimpleNamespace) -> None:
    run(AlertConfig(stalled_least_s=0.01, stalled_factor=0.01), outbox, [steps.at(1)])
    assert causes(outbox) == []


def test_a_cause_is_repeated_only_after_a_while(tmp_path: Path, outbox: Outbox, webhook: Any) -> None:
    assert outbox.tell("x", "first", step=1)
    assert not outbox.tell("x", "again", step=2)
    assert outbox.tell("y", "other", step=2)
    assert Outbox(tmp_path / "run" / "metrics", repeat_s=0).tell("x", "later", step=3)
    assert [taken["text"] for taken in webhook.taken] == ["run: first", "run: other", "run: later"]


def test_others_listen_too(tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []
    (tmp_path / "metrics").mkdir()
    Outbox(tmp_path / "metrics", repeat_s=1, announce=lambda cause, text: heard.append((cause, text))).tell(
        "x", "words", step=None
    )
    assert heard == [("x", "words")]


def test_what_one_alert_meets_is_one_line_and_the_others_are_told(
    tmp_path: Path, steps: SimpleNamespace, webhook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(cause: str, text: str) -> None:
        if cause == "slowdown":
            raise RuntimeError("key=secret")

    (tmp_path / "metrics").mkdir()
    outbox = Outbox(tmp_path / "metrics", repeat_s=0, announce=broken)  # so it is tried at every look
    told: list[Any] = webhook.taken
    figures = {"step_time_recent_s": 0.4, "step_time_p50_s": 0.2, "straggler_score": {"0": 0.5, "1": 2.0}}
    run(
        AlertConfig(),
        outbox,
        [steps.at(step, **figures) for step in range(1, 26)],
        until=lambda: sum(taken["cause"] == "straggler" for taken in told) > 1,
    )
    assert webhook.told()["straggler"] > 1
    assert caplog.messages.count("alert slowdown could not be told: RuntimeError") == 1
    assert "secret" not in caplog.text


def test_a_rule_that_fails_ends_no_watch(
    outbox: Outbox, steps: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rule = Alerts._causes

    def fails_first(self: Alerts, newest: Any) -> Any:
        monkeypatch.setattr(Alerts, "_causes", rule)
        raise KeyError("x")

    monkeypatch.setattr(Alerts, "_causes", fails_first)
    config, slow = AlertConfig(checkpoint_age_s=60), steps.at(3, checkpoint_age_s=61.0)
    run(config, outbox, [slow], until=lambda: bool(outbox.told()))
    assert causes(outbox) == ["checkpoint_age"]
    assert "the alerts' rules failed: KeyError" in caplog.messages


def test_a_failure_is_told_by_its_event(tmp_path: Path, outbox: Outbox, webhook: Any) -> None:
    event = {"event": "failed", "type": "DeviceMemoryError", "message": "out of memory: use less"}
    for _ in range(2):
        tell_failure(tmp_path / "run" / "metrics", event, repeat_s=60)
    assert [taken["cause"] for taken in webhook.taken] == ["out_of_memory"]
    assert webhook.taken[0]["text"] == "run: out of memory: use less"


def test_a_folder_that_is_gone_does_not_hide_the_failure(tmp_path: Path) -> None:
    tell_failure(tmp_path / "gone", {"message": "x"}, repeat_s=60)


def test_a_line_that_a_full_disk_has_torn_hides_nothing(outbox: Outbox, webhook: Any, tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics" / "alerts.jsonl"
    outbox.tell("x", "first", step=1)
    file.write_text(file.read_text() + '{"time": 1.0, "cau')
    tell_failure(tmp_path / "run" / "metrics", {"event": "failed", "cause": "y"}, repeat_s=60)
    assert causes(outbox) == ["x", "y"]
    assert [taken["cause"] for taken in webhook.taken] == ["x", "y"]


def test_a_full_disk_keeps_no_alert_from_anybody_and_repeats_none(
    outbox: Outbox, webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(alerts_module, "append_record", full)
    with pytest.raises(OSError, match="No space left"):
        outbox.tell("storage_full", "words", step=3)
    assert not outbox.tell("storage_full", "words", step=4)
    assert [taken["step"] for taken in webhook.taken] == [3]


def test_slack_gets_a_text_and_nothing_else() -> None:
    record = {"run": "r", "text": "t", "cause": "c"}
    request = alerts_module._request("https://hooks.slack.com/services/T/B/x", record)
    assert isinstance(request.data, bytes)
    assert json.loads(request.data) == {"text": "r: t"}


def test_no_address_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHWRIGHT_WEBHOOK_URL", raising=False)
    assert not post({"run": "r", "text": "t"})


@pytest.mark.parametrize("address", ["ftp://secret/x", "secret", "http://secret:x/", "http:///secret"])
def test_a_bad_address_is_never_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("MESHWRIGHT_WEBHOOK_URL", address)
    assert not post({"run": "r", "text": "t"})
    assert "secret" not in caplog.text
    assert caplog.messages == [
        "MESHWRIGHT_WEBHOOK_URL did not take the alert: it is not an address that begins with http:// or https://"
    ]


def test_a_refusing_or_absent_server_is_one_line(webhook: Any, caplog: pytest.LogCaptureFixture) -> None:
    webhook.answer = 403
    assert not post({"run": "r", "text": "t"})
    assert caplog.record_tuples == [
        (
            "launcher.monitor.alerts",
            logging.WARNING,
            "MESHWRIGHT_WEBHOOK_URL did not take the alert: it answered 403",
        )
    ]
    webhook.shutdown()
    webhook.server_close()
    assert not post({"run": "r", "text": "t"})
    assert "secret-path" not in caplog.text
    assert caplog.messages[-1].endswith("Connection refused")
