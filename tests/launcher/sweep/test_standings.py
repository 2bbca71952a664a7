"""The order of points, what is said of it, and how far predictions are off with and without the other points."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.sweep.standings import (
    HEADER,
    Standing,
    accuracies,
    ranked,
    rows,
    sentences,
    state_text,
    to_json,
)

POINT = Standing(
    name="01-a",
    shown="a",
    strategy="fake",
    plan="fake dp=1",
    num_nodes=1,
    num_gpus=1,
    tokens_per_step=1000,
    predicted_s=1.0,
    predicted_bytes=2**30,
    state="finished",
    step=10,
    num_steps=10,
    measured_s=2.0,
    measured_bytes=2**29,
)
WIDE = replace(POINT, name="02-b", shown="b", num_nodes=2, num_gpus=4, measured_s=1.0)
WAITING = replace(POINT, name="03-c", state="queued", step=0, measured_s=None, measured_bytes=None)
FAILED = replace(
    POINT, name="04-d", state="failed", cause="out of memory: 3 GiB", exit_code=10, measured_s=0.1
)
DROPPED = ({"shown": "tp=3", "reason": "plan.tp=3 does not divide", "exit_code": 3},)


def test_the_fastest_is_first_and_the_failed_last_whatever_they_measured() -> None:
    found = ranked([FAILED, WAITING, POINT, WIDE], DROPPED)
    assert [point.name for point in found.points] == ["02-b", "01-a", "03-c", "04-d"]
    assert [row[0] for row in rows(found)] == ["1", "2", "-", "-"]
    assert all(len(row) == len(HEADER) for row in rows(found))
    winner, thrifty = found.winner(), found.winner(per_gpu=True)
    assert winner is not None and thrifty is not None
    assert (winner.name, thrifty.name) == ("02-b", "01-a")
    told = sentences(found, folder="/s")
    assert told[:2] == ["fastest   02-b: 1,000 tokens/s", "per GPU   01-a: 500 tokens/s/GPU"]
    assert not found.is_over and ranked([POINT, FAILED], ()).is_over


def test_a_failure_is_named_with_its_code() -> None:
    assert state_text(FAILED) == "failed (10): out of memory: 3 GiB"
    assert state_text(WAITING) == "queued, step 0 of 10"
    assert state_text(POINT) == "finished"


def test_predictions_are_scaled_by_the_other_points_of_their_engine() -> None:
    # Twice as slow as predicted, more or less: the common factor takes most of the error away.
    points = [replace(POINT, name=str(n), measured_s=s) for n, s in enumerate((1.9, 2.0, 2.1, 2.0))]
    (found,) = accuracies(ranked(points, ()))
    assert found.before == pytest.approx(0.5)
    assert found.after is not None and found.after < 0.06
    told = sentences(ranked(points, ()), folder="/s")[-1]
    assert "off by 50% in the median of 4 points, by " in told and "; plan.calibration=/s does that" in told


def test_points_without_a_common_factor_are_not_scaled() -> None:
    points = [replace(POINT, name=str(n), measured_s=s) for n, s in enumerate((0.2, 1.0, 5.0))]
    assert sentences(ranked(points, ()), folder="/s")[-1].endswith(": no common factor explains them")


def test_two_points_scale_nothing() -> None:
    found = ranked([POINT, WIDE], ())
    assert [one.after for one in accuracies(found)] == [None]
    assert sentences(found, folder="/s")[-1].endswith("; 3 would tell a common factor")


def test_nothing_measured_is_no_winner() -> None:
    found = ranked([WAITING, FAILED], DROPPED)
    assert found.winner() is None and sentences(found, folder="/s") == []
    data = to_json(found)
    assert data["winner"] is None and data["dropped"] == [dict(DROPPED[0])]
    assert [point["exit_code"] for point in data["points"]] == [None, 10]
