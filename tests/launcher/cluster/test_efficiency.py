"""Efficiency: refused values, the precisions that share a figure, and every packaged file with its source."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from launcher.cluster.efficiency import Efficiency
from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from launcher.decode import decode
from launcher.errors import ConfigError
from strategies.spec import Precision


def files(group: str) -> dict[str, dict[str, Any]]:
    folder = resources.files("hydra_configs") / group
    return {
        entry.name.removesuffix(".yaml"): yaml.safe_load(entry.read_text("utf-8"))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


EFFICIENCIES = files("efficiency")
CLUSTERS = {name: values for name, values in files("cluster").items() if name not in ("local", "slurm")}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"memory": 0}, r"cluster\.gpu\.efficiency\.memory=0 must be above 0"),
        ({"grouped_matmul": -1.0}, r"efficiency\.grouped_matmul=-1\.0 must be above 0"),
        ({"misaligned_matmul": 0.0}, r"efficiency\.misaligned_matmul=0\.0 must be above 0"),
        ({"ring_attention": 0.0}, r"efficiency\.ring_attention=0\.0 must be above 0"),
        ({"attention_backward": float("nan")}, r"efficiency\.attention_backward=nan must be above 0"),
        ({"matmul": {"fp8": 1.5}}, r"efficiency\.matmul\.fp8=1\.5 must lie between 0 and 1"),
        ({"matmul": {"bf16": 0.0}}, r"efficiency\.matmul\.bf16=0\.0 must lie between 0 and 1"),
        ({"matmul": {}}, r"efficiency\.matmul=\{\} must hold one share at least"),
        ({"attention": {}}, r"efficiency\.attention=\{\} must hold one share at least"),
        ({"attention": {"flash": 0.5, "unfused": 0}}, r"efficiency\.attention\.unfused=0 must be above 0"),
    ],
)
def test_what_would_divide_by_nothing_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Efficiency(**values)


def test_memory_may_be_faster_than_its_data_sheet() -> None:
    assert Efficiency(memory=5.0).memory == 5.0  # caches of a CPU


@pytest.mark.parametrize(
    ("shares", "precision", "expected"),
    [
        ({"bf16": 0.7, "fp8": 0.5}, "fp8", 0.5),
        ({"bf16": 0.7, "fp8": 0.5}, "nvfp4", 0.7),
        ({"fp16": 0.6, "fp32": 0.9}, "fp16", 0.6),
        ({"fp16": 0.6, "fp32": 0.9}, "bf16", 0.9),
    ],
)
def test_a_precision_without_a_share_reaches_that_of_bf16(
    shares: dict[Precision, float], precision: Precision, expected: float
) -> None:
    assert Efficiency(matmul=shares).matmul_share(precision) == expected


def test_a_kernel_without_a_share_is_the_slowest() -> None:
    efficiency = Efficiency(attention={"flash": 0.5, "unfused": 0.2})
    assert efficiency.attention_share("flash") == 0.5
    assert efficiency.attention_share("flash3") == 0.2


@pytest.mark.parametrize("name", EFFICIENCIES)
def test_every_file_decodes_and_names_its_source(name: str) -> None:
    values = EFFICIENCIES[name]
    assert decode(Efficiency, values, "cluster.gpu.efficiency").source == values["source"]
    assert values["source"] not in ("", "defaults")


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'cluster\.gpu\.efficiency\.matmull'"):
        decode(Efficiency, {"matmull": {"bf16": 0.5}}, "cluster.gpu.efficiency")


@pytest.mark.parametrize("name", CLUSTERS)
def test_presets_take_the_figures_of_their_file(name: str) -> None:
    defaults = [entry for entry in CLUSTERS[name].get("defaults", ()) if isinstance(entry, dict)]
    [chosen] = [file for entry in defaults for key, file in entry.items() if "efficiency" in key]
    (job,) = jobs([f"cluster={name}", "training.precision=fp32"])
    assert isinstance(job.cluster, ClusterSpec)
    assert job.cluster.gpu.efficiency == decode(Efficiency, EFFICIENCIES[chosen], "cluster.gpu.efficiency")


def test_every_file_is_somebody_s_choice() -> None:
    used = {
        file
        for values in files("cluster").values()
        for entry in values.get("defaults", ())
        if isinstance(entry, dict)
        for key, file in entry.items()
        if "efficiency" in key
    }
    # Where nothing is known about this machine, launcher/cluster/detect.py takes that of a CPU.
    assert set(EFFICIENCIES) - used == {"cpu"}
