"""What a wheel holds, and that nothing shadows our two generic package names."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import hydra_configs
import launcher
import strategies


def test_wheel_holds_our_packages_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(repository),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "hydra_configs",
        "launcher",
        "strategies",
    }
    assert "launcher/submit/train.sbatch" in names
    packed = {name for name in names if name.endswith((".py", ".yaml"))}
    for package in ("launcher", "strategies", "hydra_configs"):
        for source in (repository / package).rglob("*"):
            if source.suffix in (".py", ".yaml"):
                assert str(source.relative_to(repository)) in packed


def test_our_packages_come_from_one_place() -> None:
    parents = {Path(module.__file__ or "").parents[1] for module in (launcher, strategies, hydra_configs)}
    assert len(parents) == 1, (
        f"`launcher`, `strategies` and `hydra_configs` come from {sorted(map(str, parents))}; "
        "is the unrelated PyPI package `strategies` installed? Uninstall it and install meshwright again"
    )
