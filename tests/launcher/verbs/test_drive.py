from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.output import Output
from launcher.run_dir import RunDir, open_run
from launcher.verbs import drive as module
from launcher.verbs.drive import drive

SMALL = (
    *("strategy=fake", "monitor=none", "data.max_bytes=200000", "training.sequence_length=32"),
    *(
        "training.global_batch_size=8",
        "training.num_steps=4",
        "cluster.num_nodes=2",
        "cluster.gpus_per_node=1",
    ),
)


@pytest.mark.parametrize(("node", "leads"), [(0, True), (1, False)])
def test_the_first_host_leads_and_the_others_follow(
    call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    node: int,
    leads: bool,
) -> None:
    words = (*SMALL, "submit=torchrun", "submit.hosts=[a,b]", f"run_dir={tmp_path / 'run'}")
    assert call("submit", *words).code == 0
    seen: list[Any] = []

    def lead(run: RunDir, *, quiet_stdout: bool) -> int:
        seen.append("lead")
        return 130

    def follow(run: RunDir, *, node: int, quiet_stdout: bool) -> int:
        seen.append(node)
        return 130

    monkeypatch.setattr(module, "run_workers", lead)
    monkeypatch.setattr(module, "follow", follow)
    assert drive(open_run(tmp_path / "run"), Output(as_json=False), node=node) == 130
    assert seen == (["lead"] if leads else [1])
    assert "state      created at step 0 of 4" in capsys.readouterr().out
