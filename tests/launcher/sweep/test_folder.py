"""The folder of a sweep: whole or not at all, and ordinary run directories in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from launcher import freeze
from launcher.errors import RunDirError
from launcher.sweep.folder import SweepDir, create, is_sweep, lock, open_sweep, place_of
from launcher.sweep.points import Expansion, expand

SMALL = (
    *("strategy=fake", "cluster.gpus_per_node=1", "data.max_bytes=200000", "training.sequence_length=32"),
    *("training.global_batch_size=8", "plan.micro_batch_size=1,2,3"),
)


def expanded(*words: str) -> Expansion:
    found = expand([*SMALL, *words])
    assert found is not None
    return found


def test_points_are_runs_of_one_group_and_the_record_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "my sweep"
    expansion = expanded(f"run_dir='{folder}'")
    assert place_of(expansion) == folder
    written = create(expansion, path=folder, command=["meshwright", "sweep", "x"])
    assert open_sweep(folder) == written
    assert [entry.name for entry in written.record.points] == [
        "01-micro_batch_size-1",
        "02-micro_batch_size-2",
    ]
    jobs = [written.run(entry).job() for entry in written.record.points]
    assert [job.plan.micro_batch_size for job in jobs] == [1, 2]
    assert {job.monitor.wandb_group for job in jobs} == {"my sweep"}
    assert written.record.dropped[0].exit_code == 3
    with pytest.raises(RunDirError, match="already holds a sweep; continue it with `meshwright resume"):
        place_of(expansion)


def test_a_group_that_is_named_stays(tmp_path: Path) -> None:
    expansion = expanded("monitor.wandb_group=mine", f"run_dir={tmp_path / 's'}")
    written = create(expansion, path=tmp_path / "s", command=[])
    assert written.run(written.record.points[0]).job().monitor.wandb_group == "mine"


def test_after_a_fault_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = freeze.write, []

    def fails_at_the_second(*given: object, **named: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(freeze, "write", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        create(expanded(), path=tmp_path / "s", command=[])
    assert len(calls) == 2 and not (tmp_path / "s").exists()


def test_of_two_sweeps_of_one_folder_the_first_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.mkdir()
    descriptor = lock(SweepDir(path=path, record=create(expanded(), path=tmp_path / "t", command=[]).record))
    with pytest.raises(RunDirError, match="by another `meshwright sweep`"):
        create(expanded(), path=path, command=[])
    os.close(descriptor)
    first = create(expanded(), path=path, command=[])
    with pytest.raises(RunDirError, match="was taken by another sweep a moment ago"):
        create(expanded(), path=path, command=[])
    assert open_sweep(path) == first and first.run(first.record.points[0]).plan()


def test_a_folder_without_a_name_lies_among_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = place_of(expanded())
    assert path.parent == tmp_path / "runs" and path.name.endswith("-debug_tiny-sweep")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not the folder of a sweep: sweep.json is missing"),
        ("{", "cannot be read; the folder of the sweep is damaged"),
        ('{"format": 7}', "has format 7; this version reads 1"),
        ('{"format": 1}', "is damaged: missing key 'sweep.created'"),
        ("[]", "is damaged"),
    ],
)
def test_what_is_no_sweep_is_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(RunDirError) as error:
        open_sweep(tmp_path)
    assert sentence in str(error.value)


def test_a_sweep_may_be_moved(swept: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(swept, tmp_path / "moved"))
    assert is_sweep(moved) and not is_sweep(tmp_path)
    found = open_sweep(moved)
    assert found.run(found.record.points[0]).path.parent == moved
    assert json.loads((moved / "sweep.json").read_text())["steps"] == 12
