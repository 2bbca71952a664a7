"""Parts of a step, by hand: what overlaps counts once, and the parts make up the step."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.monitor.traces.groups import ASIDE
from launcher.monitor.traces.trace import STEP, figures, summarise


def event(name: str, start: float, end: float, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, "cat": cat, "args": args}


def test_a_step_on_a_cpu() -> None:
    found = summarise(
        [
            event(f"{STEP}4", 0.0, 10.0, "user_annotation"),
            event("aten::mm", 1.0, 4.0),
            event("aten::inner", 2.0, 3.0),  # inside the other one
            event("c10d::allreduce_", 4.0, 4.5),
            event("gloo:all_reduce", 3.0, 7.0, "user_annotation"),
            event("aten::add", 7.5, 12.0),  # reaches beyond the step
            {"ph": "M", "name": "process_name"},
        ],
        groups={},
    )
    assert found.pop("by operation") == {"gloo:all_reduce": pytest.approx(4.0)}
    assert found.pop("by group") == {"unnamed": pytest.approx(4.0)}
    assert found == {
        "step": pytest.approx(10.0),
        "compute": pytest.approx(5.5),
        "communication": pytest.approx(4.0),
        "exposed communication": pytest.approx(3.0),
        "idle": pytest.approx(1.5),
    }


def test_steps_on_a_gpu_count_kernels_and_name_groups() -> None:
    found = summarise(
        [
            event(f"{STEP}4", 0.0, 5.0, "user_annotation"),
            event(f"{STEP}5", 5.0, 10.0, "user_annotation"),
            event("aten::mm", 0.0, 9.0),  # the host's part does not count
            event("gemm", 1.0, 3.0, "kernel"),
            event("Memcpy", 3.0, 3.5, "gpu_memcpy"),
            event(
                "ncclDevKernel_AllReduce",
                2.0,
                6.0,
                "kernel",
                **{"Collective name": "allreduce", "Process Group Description": "dp"},
            ),
        ],
        groups={},
    )
    assert found["step"] == pytest.approx(5.0)
    assert found["compute"] == pytest.approx(1.25)
    assert found["communication"] == pytest.approx(2.0)
    assert found["exposed communication"] == pytest.approx(1.25)
    assert found["idle"] == pytest.approx(2.5)
    assert found["by operation"] == {"dp: allreduce": pytest.approx(2.0)}
    assert found["by group"] == {"dp": pytest.approx(2.0)}
    parts = found["compute"] + found["exposed communication"] + found["idle"]
    assert parts == pytest.approx(found["step"])


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"Process Group Name": "7", "Process Group Description": "TENSOR_MODEL_PARALLEL_GROUP"}, "tp"),
        ({"Process Group Name": "8", "Process Group Description": "mesh_new"}, "mesh_new"),
        ({"Process Group Name": "8", "Process Group Description": "undefined"}, "8"),
        ({}, "unnamed"),
    ],
)
def test_groups_are_called_as_the_plan_calls_them_or_as_they_are_described(
    told: dict[str, str], name: str
) -> None:
    events = [
        event(f"{STEP}4", 0.0, 5.0, "user_annotation"),
        event("gloo:all_reduce", 1.0, 2.0, "user_annotation", **told),
    ]
    assert summarise(events, groups={"7": "tp"})["by group"] == {name: pytest.approx(1.0)}


def test_what_is_sent_beside_the_training_is_not_the_steps() -> None:
    events = [
        event(f"{STEP}4", 0.0, 5.0, "user_annotation"),
        event("gloo:all_reduce", 1.0, 2.0, "user_annotation", **{"Process Group Name": "7"}),
    ]
    found = summarise(events, groups={"7": ASIDE})
    assert (found["by group"], found["by operation"], found["communication"]) == ({}, {}, 0.0)


def test_ranks_become_metrics_of_a_step() -> None:
    parts = {"exposed communication": 1.0, "idle": 0.5, "by group": {"dp": 2.0, "ep": 1.0}}
    other = {"exposed communication": 3.0, "idle": 1.5, "by group": {"dp": 4.0}}
    assert figures([parts, other]) == {
        "communication_s": {"dp": 3.0, "ep": 1.0},
        "exposed_communication_s": 2.0,
        "idle_s": 1.0,
    }


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no marked step"):
        summarise([event("aten::mm", 0.0, 1.0)], groups={})
