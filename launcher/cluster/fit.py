"""Timed operations to the figures of the cost model: what `meshwright probe` measured, as a ClusterSpec. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link, Measured

# FlashAttention-2, section 3.1: five products backward for two forward.
_ATTENTION_BACKWARD = 2.5
# Kernels of an eager layer as planner/price/compute.py counts them: 36 forward, one and a half times that backward.
_LAYER_KERNELS = 36 * 2.5


def to_cluster(
    cluster: ClusterSpec, figures: Mapping[str, Any], *, name: str, measured: Measured
) -> ClusterSpec:
    """Put the figures in the place of guesses; peaks of a data sheet stay, and efficiency is the share of them."""
    links = tuple(
        fit_link(link, [row for row in figures["collectives"] if row["tier"] == tier])
        for tier, link in enumerate(cluster.links)
    )
    return replace(cluster, name=name, gpu=_gpu(cluster.gpu, figures), links=links, measured=measured)


def _gpu(gpu: GpuSpec, figures: Mapping[str, Any]) -> GpuSpec:
    fits = {
        precision: fit_products([row for row in figures["products"] if row["precision"] == precision])
        for precision in dict.fromkeys(row["precision"] for row in figures["products"])
    }
    main = next(iter(fits)) if gpu.device == "cpu" or "bf16" not in fits else "bf16"
    peaks: dict[Any, float] = dict(gpu.peak_tflops)
    memory = {row["name"]: row["bytes"] / row["s"] / 1e9 for row in figures["memory"]}
    if gpu.peak_is_nominal:
        peaks = {precision: _rounded(fit.tflops) for precision, fit in fits.items()}
    copied = _rounded(memory["copy"]) if gpu.peak_is_nominal else gpu.memory_gb_per_s
    peak = peaks.get(figures["attention"][0]["precision"], peaks.get(main, 1.0))
    attention = fit_attention(figures["attention"])
    forward = attention.tflops / peak
    efficiency = replace(
        gpu.efficiency,
        matmul={
            precision: _rounded(min(1.0, fit.tflops / peaks[precision]))
            for precision, fit in fits.items()
            if precision in peaks
        },
        matmul_half_size=_rounded(fits[main].half_size),
        matmul_us=_rounded(fits[main].fixed_us),
        memory=_rounded(memory["elementwise"] / copied),
        **_host(figures["host"]),
        # torch chose the kernel; the others keep their distance to the one that it is called by here.
        attention={
            kernel: _rounded(forward * share / gpu.efficiency.attention["flash"])
            for kernel, share in gpu.efficiency.attention.items()
        },
        attention_backward=_rounded(attention.backward),
        attention_half_tiles=_rounded(attention.half_tiles),
        **_overlap(figures.get("overlap")),
        source="meshwright probe",
    )
    return replace(
        gpu, peak_tflops=peaks, memory_gb_per_s=copied, peak_is_nominal=False, efficiency=efficiency
    )


@dataclass(frozen=True, kw_only=True)
class ProductFit:
    """FLOPs of a product over `tflops`, times 1 + half_size * (1/m + 1/n + 1/k), plus `fixed_us`."""

    tflops: float
    half_size: float
    fixed_us: float


def fit_products(rows: Sequence[Mapping[str, Any]]) -> ProductFit:
    """Fit the cost model of one precision to timed products."""
    terms, seconds = [], []
    for row in rows:
        flops = 2.0 * row["m"] * row["n"] * row["k"]
        terms.append([flops, flops * (1 / row["m"] + 1 / row["n"] + 1 / row["k"]), 1.0])
        seconds.append(row["s"])
    per_flop, per_edge, fixed = fit(terms, seconds)
    per_flop = max(per_flop, 1e-18)
    return ProductFit(tflops=1e-12 / per_flop, half_size=per_edge / per_flop, fixed_us=fixed * 1e6)


@dataclass(frozen=True, kw_only=True)
class AttentionFit:
    """Rate forward over the FLOPs that the causal mask leaves; backward as a share of it; tiles at half of both."""

    tflops: float
    backward: float
    half_tiles: float


def fit_attention(rows: Sequence[Mapping[str, Any]]) -> AttentionFit:
    """Fit the cost model of attention to timed sequences."""
    terms = []
    for row in rows:
        # The shape that launcher/planner/price/compute.py gives attention beside the number of tiles.
        work = row["flops"] * (1 + 64 / row["length"]) * (1 + 32 / row["head_size"]) / 1.25
        terms.append([work, work / (row["length"] / 128 * row["heads"])])
    forward = fit(terms, [row["forward_s"] for row in rows])
    backward = fit(terms, [row["backward_s"] / _ATTENTION_BACKWARD for row in rows])
    per_flop = [max(forward[0], 1e-18), max(backward[0], 1e-18)]
    return AttentionFit(
        tflops=1e-12 / per_flop[0],
        backward=min(1.0, per_flop[0] / per_flop[1]),
        half_tiles=(forward[1] / per_flop[0] + backward[1] / per_flop[1]) / 2,
    )


def fit_link(link: Link, rows: Sequence[Mapping[str, Any]]) -> Link:
    """Fit latency and bandwidth to timed collectives by the alpha-beta model; a tier not measured stays as it is."""
    if link.switch_reduction is not None:  # all-reduces run in the switch, which is priced apart
        rows = [row for row in rows if row["name"] != "all_reduce"]
    if not rows:
        return link
    terms = [_hops_and_volume(row["name"], row["size"], row["bytes"]) for row in rows]
    latency, per_byte = fit(terms, [row["s"] for row in rows])
    return replace(
        link,
        gb_per_s=_rounded(1e-9 / max(per_byte, 1e-15)),
        latency_us=_rounded(latency * 1e6),
        efficiency=1.0,
        start_us=0.0,  # a part of the latency that was timed, as are other protocols for small messages
        small_latency=1.0,
    )


def _hops_and_volume(name: str, size: int, num_bytes: float) -> list[float]:
    """Messages one after the other, and bytes that one rank sends (Thakur et al. 2005, section 4)."""
    share = num_bytes * (size - 1) / size
    if name == "exchange":
        return [2.0, 2.0 * num_bytes]
    if name == "all_reduce":
        return [2.0 * min(math.ceil(math.log2(size)), size - 1), 2 * share]
    return [size - 1.0, share]


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Least squares of relative errors with coefficients that are not negative: the best of all subsets of terms."""
    scaled = np.array(terms) / np.array(seconds)[:, None]
    count = scaled.shape[1]
    best, least = [0.0] * count, math.inf
    for mask in range(1, 2**count):
        chosen = [column for column in range(count) if mask >> column & 1]
        found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)[0]
        error = float(np.sum((scaled[:, chosen] @ found - 1) ** 2))
        if (found >= 0).all() and error < least - 1e-12:
            best, least = [0.0] * count, error
            for column, value in zip(chosen, found, strict=True):
                best[column] = float(value)
    return best


def _host(row: Mapping[str, float]) -> dict[str, float]:
    """Share the time of tiny layers among their kernels, and what sharding adds among its collectives."""
    found = {"kernel_us": _rounded(row["whole_s"] * 1e6 / row["layers"] / _LAYER_KERNELS)}
    if "sharded_s" in row:
        # Every layer gathers its weights twice and reduces once; the root keeps what it gathered.
        collectives = 3 * row["layers"] + 2
        found["sharding_us"] = _rounded(max(0.0, row["sharded_s"] - row["whole_s"]) * 1e6 / collectives)
    return found


def _overlap(row: Mapping[str, float] | None) -> dict[str, float]:
    """What hiding an all-reduce beside products costs these, and what is left of it for those that hide it all."""
    if row is None:
        return {}
    hidden = row["sent_s"] + row["computed_s"] - row["both_s"]
    share = min(1.0, max(0.0, hidden / min(row["sent_s"], row["computed_s"])))
    return {"interference": _rounded(1 - share), "tp_overlap": _rounded(share)}


def _rounded(value: float) -> float:
    """Three figures: more were not measured."""
    return float(f"{value:.3g}")
