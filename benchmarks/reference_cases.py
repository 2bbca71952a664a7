"""The published reference points as rows of the shared format: what the source prints, and where it prints it.

Facts only; what a source leaves open is said in `assumed`. The rows of NVIDIA's Megatron-Bridge table are too many to
stand here: `bridge_points` takes the fastest of some models and GPUs from a file of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published run. The peers' figures are the relative errors of their step times."""

    name: str
    source: str
    row: Mapping[str, Any]
    common: bool = False  # one of the eleven that the peers were run on
    simumax: float | None = None
    calculon: float | None = None
    pipeline_split: tuple[int, ...] = ()  # which the shared format has no word for
    assumed: str = ""


def _gpt(name: str, layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "name": name,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "ffn": 4 * hidden,
        "vocab": 51200,
        "gated_mlp": False,
        "tied_embeddings": True,
        "seq_len": 2048,
    }


def _llama(name: str, layers: int, hidden: int, heads: int, ffn: int, seq_len: int) -> dict[str, Any]:
    return {
        "name": name,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": 8,
        "ffn": ffn,
        "vocab": 128256,
        "gated_mlp": True,
        "tied_embeddings": False,
        "seq_len": seq_len,
    }


def _layout(tp: int, pp: int, vp: int, cp: int, dp: int, mbs: int, gbs: int) -> dict[str, Any]:
    return {
        "num_gpus": tp * pp * cp * dp,
        "tp": tp,
        "pp": pp,
        "vp": vp if vp > 1 else None,
        "cp": cp,
        "dp": dp,
        "mbs": mbs,
        "gbs": gbs,
    }


_SELENE = {"gpu": "A100-SXM4-80GB", "framework": "Megatron-LM", "precision": "fp16", "zero_stage": 0}
_H100 = {
    "gpu": "H100-SXM5-80GB",
    "framework": "NeMo / Megatron-Core",
    "precision": "bf16",
    "zero_stage": 1,
    "recompute": "none",
    "sequence_parallel": True,
}

# Name, shape, layout; then seconds, SimuMax and Calculon with full recomputation, and with selective recomputation and
# sequence parallelism. The peers: SimuMax 1.2 and Calculon of 2024-02, run by us without tuning.
_KORTHIKANTI: tuple[tuple[Any, ...], ...] = (
    ("22B", (48, 6144, 64), (8, 1, 1, 1, 1, 4, 4), (1.42, -0.075, -0.017), (1.10, -0.116, 0.033)),
    ("175B", (96, 12288, 96), (8, 8, 3, 1, 1, 1, 64), (18.13, -0.027, -0.006), (13.75, -0.064, -0.008)),
    ("530B", (105, 20480, 128), (8, 35, 3, 1, 1, 1, 280), (49.05, 0.039, 0.017), (37.83, -0.031, -0.089)),
    ("1T", (128, 25600, 160), (8, 64, 1, 1, 1, 1, 512), (94.42, 0.059, -0.046), (71.49, 0.023, -0.076)),
)


def _korthikanti() -> Iterator[Point]:
    for name, shape, layout, *printed in _KORTHIKANTI:
        for recompute, (seconds, simumax, calculon) in zip(("full", "selective"), printed, strict=True):
            row = {
                **_SELENE,
                **_layout(*layout),
                "version": "2022",
                "id": f"korthikanti22-{name}-{recompute}",
                "model": _gpt(f"gpt-{name}", *shape),
                "recompute": recompute,
                "sequence_parallel": recompute == "selective",
                "step_time_s": seconds,
            }
            yield Point(
                name=f"GPT {name}, {row['num_gpus']} A100, {recompute} recompute",
                source="Korthikanti et al. 2022, tables 3 and 5",
                row=row,
                common=True,
                simumax=simumax,
                calculon=calculon,
            )


_GPT3_A100 = Point(
    name="GPT-3 175B, 1,024 A100, full recompute",
    source="Narayanan et al. 2021, section 5.1: 140 TFLOP/s a GPU at a batch of 1,536",
    row={
        **_SELENE,
        **_layout(8, 16, 1, 1, 8, 1, 1536),
        "version": "2021",
        "id": "narayanan21-175B-1024",
        "model": _gpt("gpt-175B", 96, 12288, 96),
        "recompute": "full",
        "sequence_parallel": False,
        "tflops_per_gpu": 140,
        "flop_formula": "narayanan_hw",
    },
    common=True,
    simumax=0.010,
    calculon=-0.118,
    assumed="tp 8, pp 16, dp 8, micro-batch 1, not interleaved; seconds by the paper's equation 3",
)
_GPT3_H100 = Point(
    name="GPT-3 175B, 128 H100",
    source="NVIDIA dgxc-benchmarking, README of NeMo 24.11",
    row={
        **_H100,
        **_layout(4, 8, 12, 1, 4, 1, 256),
        "id": "dgxc-175B-128",
        "model": _gpt("gpt3-175b", 96, 12288, 96),
        "step_time_s": 8.91,
    },
    common=True,
    simumax=0.011,
    calculon=0.065,
    assumed="micro-batch 1, no recomputation; a later release prints 8.31 s",
)
_LLAMA_H100 = Point(
    name="Llama 3.1 70B, 64 H100",
    source="NVIDIA dgxc-benchmarking, README of NeMo 24.12",
    row={
        **_H100,
        **_layout(4, 4, 5, 2, 2, 1, 128),
        "id": "dgxc-70B-64",
        "model": _llama("llama3.1-70b", 80, 8192, 64, 28672, 8192),
        "step_time_s": 14.61,
    },
    common=True,
    simumax=0.101,
    calculon=0.97,
    assumed="micro-batch 1, no recomputation",
)
# GPUs, cp, dp, sequence, sequences of a dp rank, TFLOP/s of a GPU.
_HERD = (
    (8192, 1, 64, 8192, 32, 430),
    (16384, 1, 128, 8192, 16, 400),
    (16384, 16, 8, 131072, 16, 380),
)
_HERD_ASSUMED = (
    "micro-batch 1, no recomputation, chunks of one layer with an empty one at either end (the paper takes one layer "
    "from the first and the last stage), Megatron-core's kernels, ring attention (the paper gathers keys and values), "
    "and ZeRO 1 (the paper shards gradients too, and lets go of tensors early); "
    "the paper does not say how it counts FLOPs: 6 for each parameter outside the token table, and causal attention"
)


def _llama_405b() -> Iterator[Point]:
    for gpus, cp, dp, length, per_rank, tflops in _HERD:
        yield Point(
            name=f"Llama 3 405B, {gpus:,} H100, sequences of {length:,}",
            source="The Llama 3 Herd of Models (2024), table 4",
            row={
                **_H100,
                **_layout(8, 16, 8, cp, dp, 1, dp * per_rank),
                "id": f"llama3-405B-{gpus}-{length}",
                "model": _llama("llama3.1-405b", 126, 16384, 128, 53248, length),
                "tflops_per_gpu": tflops,
                "flop_formula": "model_causal",
            },
            pipeline_split=(0, *(1,) * 126, 0),
            assumed=_HERD_ASSUMED,
        )


def fixed_points() -> tuple[Point, ...]:
    """Return the points that stand here: the eleven common ones first."""
    return (*_korthikanti(), _GPT3_A100, _GPT3_H100, _LLAMA_H100, *_llama_405b())


# The best rows of the Megatron-Bridge table: model, GPU, and whether it shards weights (Megatron-FSDP).
_BRIDGE = (
    ("llama3-70b", "GB200", False),
    ("llama3-70b", "GB200", True),
    ("llama3.1-405b", "H100-SXM5-80GB", False),
    ("llama3.1-405b", "B200-SXM", False),
    ("deepseek-v3", "GB200", False),
    ("qwen3-235b-a22b", "H100-SXM5-80GB", False),
    ("qwen3-30b-a3b", "GB300", False),
    ("gpt-oss-120b", "GB300", False),
)


def bridge_points(rows: Iterable[Mapping[str, Any]]) -> tuple[Point, ...]:
    """Return the fastest complete pre-training row of each kind, by tokens per second; not every kind has one."""
    found: dict[tuple[str, str, bool], Mapping[str, Any]] = {}
    for row in filter(_complete, rows):
        kind = (row["model"]["name"], row["gpu"], row.get("zero_stage") == 3)
        best = found.setdefault(kind, row)
        found[kind] = max(best, row, key=lambda one: float(one["tokens_per_s_per_gpu"]))
    return tuple(_bridge_point(found[kind]) for kind in _BRIDGE if kind in found)


def _complete(row: Mapping[str, Any]) -> bool:
    return bool(
        "Megatron-Bridge" in str(row.get("framework"))
        and row.get("task") == "pretrain"
        and row["usable"].get("full_step_time_target")
        and row.get("tokens_per_s_per_gpu")
        and row["precision"] != "nvfp4"  # which no engine here is planned with
    )


def _bridge_point(row: Mapping[str, Any]) -> Point:
    gpu = str(row["gpu"]).partition("-")[0]
    sharded = ", FSDP" if row.get("zero_stage") == 3 else ""
    return Point(
        name=f"{row['model']['name']}, {row['num_gpus']:,} {gpu}, {row['precision']}{sharded}",
        source=f"Megatron-Bridge performance summary, {row['version']} ({row['id']})",
        row=row,
    )
