from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.preflight import gpus, look
from launcher.preflight.look import Port


def test_this_node_shows_itself(tmp_path: Path) -> None:
    found = look.look(host="here", folders={"the run directory": tmp_path}, timeout_s=60)
    assert found.host == "here" and not found.silent
    assert found.versions is not None and {"meshwright", "python"} <= set(found.versions)
    assert found.memory_gib is not None and found.memory_gib > 0
    assert found.volumes is not None and found.volumes[0].fault is None
    assert found.volumes[0].free_gib > 0 and not list(tmp_path.iterdir())


def test_a_look_that_hangs_is_left_behind_and_one_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the driver is confused")

    monkeypatch.setattr(look, "read_ports", lambda folder: time.sleep(30))
    monkeypatch.setattr(gpus, "readings", fail)
    started = time.monotonic()
    found = look.look(host="here", folders={}, timeout_s=5)
    assert time.monotonic() - started < 20
    assert found.silent == {
        "gpu_readings": "RuntimeError: the driver is confused",
        "ports": "no answer within 5 s",
    }
    assert found.ports is None and found.volumes == ()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert look.volume(tmp_path / "none", use="x").fault == "No such file or directory"
    assert look.volume(Path("/proc"), use="x").fault is not None


def test_ports_are_read_as_the_kernel_shows_them(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    told = {"state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "400 Gb/sec (4X NDR)"}
    for name, text in {**told, "link_layer": "InfiniBand"}.items():
        (port / name).write_text(f"{text}\n")
    (tmp_path / "mlx5_1" / "ports" / "1").mkdir(parents=True)
    first, second = look.read_ports(tmp_path)
    assert first == Port(
        name="mlx5_0/1", state="ACTIVE", physical="LinkUp", rate="400 Gb/sec (4X NDR)", layer="InfiniBand"
    )
    assert (second.name, second.state) == ("mlx5_1/1", "")
    assert look.read_ports(tmp_path / "none") == ()
