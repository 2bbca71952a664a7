"""What a machine is taken for: presets for known GPUs, guesses for unknown ones, shares of a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launcher.cluster import detect
from launcher.cluster.detect import DetectedGpu, Machine, complete, parse_nvidia_smi, select_visible
from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from launcher.decode import decode, encode
from launcher.errors import ClusterError

LOCAL: dict[str, Any] = yaml.safe_load(
    (resources.files("hydra_configs") / "cluster" / "local.yaml").read_text("utf-8")
)
CPU = Machine(gpus=(), num_cores=8, memory_gib=32.0)


def gpu_machine(name: str, *, count: int = 2, memory_gib: float = 79.0, has_bf16: bool = True) -> Machine:
    gpus = tuple(
        DetectedGpu(index=i, uuid=f"GPU-{i}aa", name=name, memory_gib=memory_gib, has_bf16=has_bf16)
        for i in range(count)
    )
    return replace(CPU, gpus=gpus)


def spec(machine: Machine, **given: Any) -> ClusterSpec:
    return decode(ClusterSpec, complete(LOCAL | given, machine=machine), "cluster")


def preset(name: str) -> ClusterSpec:
    """A packaged option as Hydra composes it."""
    return jobs([f"cluster={name}"])[0].cluster


def test_without_a_gpu_two_processes_share_the_machine() -> None:
    cluster = spec(CPU)
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.gpu.device) == (1, 2, "cpu")
    assert cluster.gpu.memory_gib == 16.0
    assert cluster.gpu.peak_is_nominal
    assert "bf16" not in cluster.gpu.peak_tflops
    assert spec(replace(CPU, num_cores=1)).gpus_per_node == 1


def test_on_a_cpu_any_number_of_processes_may_share() -> None:
    four, sixteen = spec(CPU, gpus_per_node=4), spec(CPU, gpus_per_node=16)
    assert (four.gpus_per_node, four.gpu.memory_gib) == (4, 8.0)
    assert four.gpu.peak_tflops["fp32"] == pytest.approx(spec(CPU).gpu.peak_tflops["fp32"] / 2)
    assert sixteen.gpu.peak_tflops["fp32"] == pytest.approx(four.gpu.peak_tflops["fp32"] / 4)


def test_processes_of_several_hosts_have_a_link_inside_and_one_between() -> None:
    assert [link.size for link in spec(CPU, num_nodes=2, gpus_per_node=4).links] == [4, None]
    assert [link.size for link in spec(CPU, num_nodes=2, gpus_per_node=1).links] == [None]
    assert [link.size for link in spec(CPU, gpus_per_node=4).links] == [None]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200_nvl72"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA L40S", "l40s_pcie"),
    ],
)
def test_a_known_gpu_has_the_figures_of_its_preset(name: str, expected: str) -> None:
    cluster = spec(gpu_machine(name, memory_gib=78.5))
    known = preset(expected)
    assert cluster.gpu == replace(known.gpu, name=name, memory_gib=78.5)
    assert cluster.links == known.links
    assert cluster.reserved_gib == known.reserved_gib
    assert (cluster.name, cluster.gpus_per_node, cluster.host_memory_gib) == ("local", 2, 32.0)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090",
    ],
)
def test_an_unknown_gpu_is_a_guess_and_says_so(name: str) -> None:
    cluster = spec(gpu_machine(name))
    assert cluster.gpu.peak_is_nominal
    assert cluster.gpu.memory_gib == 79.0
    assert "bf16" in cluster.gpu.peak_tflops
    assert "bf16" not in spec(gpu_machine(name, has_bf16=False)).gpu.peak_tflops


def test_given_values_stay() -> None:
    cluster = spec(
        gpu_machine("NVIDIA H200"), gpu={"memory_gib": 20.0, "name": None}, reserved_gib=0.5, num_nodes=3
    )
    assert (cluster.gpu.memory_gib, cluster.gpu.name) == (20.0, "NVIDIA H200")
    assert (cluster.reserved_gib, cluster.num_nodes, cluster.gpus_per_node) == (0.5, 3, 2)


def test_a_cpu_may_be_asked_for_beside_gpus() -> None:
    cluster = spec(gpu_machine("NVIDIA H200"), gpu={"device": "cpu"}, gpus_per_node=4)
    assert (cluster.gpu.device, cluster.gpus_per_node) == ("cpu", 4)


def test_a_complete_section_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "probe", lambda: pytest.fail("nothing was null"))
    assert detect.detect(encode(preset("h100_sxm"))) == preset("h100_sxm")


def test_more_gpus_than_there_are_is_one_sentence() -> None:
    with pytest.raises(ClusterError) as error:
        spec(gpu_machine("NVIDIA H200"), gpus_per_node=4)
    assert str(error.value) == "cluster.gpus_per_node=4 exceeds the 2 GPUs visible here; use 2 or less"
    assert spec(gpu_machine("NVIDIA H200"), gpus_per_node=1).gpus_per_node == 1


def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ClusterError, match=r"cluster\.gpu\.device=cuda, but this machine shows no GPU"):
        spec(CPU, gpu={"device": "cuda"})


def test_different_gpus_are_one_sentence() -> None:
    one, other = gpu_machine("NVIDIA H200", count=1), gpu_machine("NVIDIA L40S", count=1)
    with pytest.raises(ClusterError, match=r"the visible GPUs differ \(NVIDIA H200, NVIDIA L40S\)"):
        spec(replace(CPU, gpus=one.gpus + other.gpus))


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-1", [1]),
        ("0,9,1", [0]),  # CUDA stops at the first name it does not know
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices(visible: str | None, indices: list[int]) -> None:
    gpus = gpu_machine("G", count=3).gpus
    assert [gpu.index for gpu in select_visible(gpus, visible)] == indices


def test_visible_devices_that_name_nothing_are_one_sentence() -> None:
    with pytest.raises(ClusterError, match=r"CUDA_VISIBLE_DEVICES=7 names none of this machine's 3 GPUs"):
        select_visible(gpu_machine("G", count=3).gpus, "7")
    assert select_visible((), "7") == []


def test_nvidia_smi_is_read() -> None:
    text = (
        "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 9.0\n1, GPU-bb, Tesla V100-SXM2-32GB, 32768, 7.0\nnoise\n"
    )
    first, second = parse_nvidia_smi(text)
    assert first == DetectedGpu(
        index=0, uuid="GPU-aa", name="NVIDIA H100 80GB HBM3", memory_gib=81559 / 1024, has_bf16=True
    )
    assert (second.memory_gib, second.has_bf16) == (32.0, False)


class NVMLError(Exception):
    """The bindings' own error class."""


def bindings(**replaced: Callable[..., Any]) -> SimpleNamespace:
    """NVML's Python bindings with one GPU in the machine."""
    gib = 2**30
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle, version: SimpleNamespace(total=80 * gib, reserved=gib),
        "nvmlDeviceGetUUID": lambda handle: b"GPU-1",
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
    }
    return SimpleNamespace(NVMLError=NVMLError, nvmlMemory_v2=2, **(functions | replaced))


def refuse() -> None:
    raise NVMLError


def test_nvml_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", bindings())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (gpu,) = detect.probe().gpus
    assert gpu == DetectedGpu(index=0, uuid="GPU-1", name="NVIDIA H100 80GB HBM3", memory_gib=79.0)


def test_a_lost_gpu_is_left_out_and_the_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(index: int) -> int:
        if index == 1:
            raise NVMLError
        return index

    machine = bindings(nvmlDeviceGetCount=lambda: 4, nvmlDeviceGetHandleByIndex=handle)
    monkeypatch.setitem(sys.modules, "pynvml", machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.index for gpu in detect.probe().gpus] == [0, 2, 3]


def test_nvidia_smi_is_asked_where_nvml_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-aa, NVIDIA H200, 143771, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "pynvml", bindings(nvmlInit=refuse))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name for gpu in detect.probe().gpus] == ["NVIDIA H200"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert detect.probe().gpus == ()


def test_this_machine_is_found_without_a_framework() -> None:
    code = (
        "import sys; from launcher.cluster.detect import detect; cluster = detect({'name': 'local'}); "
        "assert cluster.world_size >= 1 and cluster.gpu.memory_gib > 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_known_gpu_brings_the_efficiency_of_its_kind() -> None:
    found = spec(gpu_machine("NVIDIA A100-SXM4-80GB")).gpu.efficiency
    packaged = (resources.files("hydra_configs") / "efficiency" / "a100.yaml").read_text("utf-8")
    assert found.matmul == yaml.safe_load(packaged)["matmul"]


def test_processors_share_one_efficiency_and_may_be_told_another() -> None:
    assert spec(CPU).gpu.efficiency.source == "meshwright probe"
    given = spec(CPU, gpu={**LOCAL["gpu"], "efficiency": {"kernel_us": 77.0}})
    assert given.gpu.efficiency.kernel_us == 77.0
