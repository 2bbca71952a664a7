"""Timed operations that follow the cost model exactly give its parameters back; what was not timed stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.fit import fit, fit_attention, fit_link, fit_products, to_cluster
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link, Measured
from launcher.planner.price.compute import Compute
from strategies.base import Execution
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

WHEN = Measured(date="2026-01-02T03:04:05+00:00", host="here", torch="2.9")
CPU = ClusterSpec(
    name="local",
    num_nodes=1,
    gpus_per_node=2,
    gpu=GpuSpec(
        name="cpu",
        device="cpu",
        memory_gib=8.0,
        memory_gb_per_s=10.0,
        peak_tflops={"fp32": 0.1},
        peak_is_nominal=True,
    ),
    links=(Link(size=None, gb_per_s=2.0, latency_us=100.0),),
    host_memory_gib=16.0,
)


def products(*, tflops: float, half_size: float, fixed_us: float, precision: str) -> list[dict[str, Any]]:
    rows = []
    for m, n, k in ((64, 64, 64), (256, 256, 256), (1024, 1024, 1024), (2048, 512, 64)):
        flops = 2 * m * n * k
        seconds = flops / tflops / 1e12 * (1 + half_size * (1 / m + 1 / n + 1 / k)) + fixed_us * 1e-6
        rows.append({"precision": precision, "m": m, "n": n, "k": k, "s": seconds})
    return rows


def attention(*, tflops: float, backward: float) -> list[dict[str, Any]]:
    """Timed by the planner's own model, so that the two cannot drift apart."""
    rows = []
    gpu = GpuSpec(name="x", memory_gib=1.0, memory_gb_per_s=1.0, peak_tflops={"bf16": tflops})
    efficiency = replace(gpu.efficiency, attention={"flash": 1.0}, attention_backward=backward)
    for length in (256, 1024, 4096):
        model = ModelSpec(
            name="x",
            model_type="llama",
            num_layers=1,
            hidden_size=512,
            num_attention_heads=8,
            ffn_hidden_size=512,
            vocab_size=64,
            max_position_embeddings=4096,
        )
        training = TrainingSpec(sequence_length=length, global_batch_size=1, num_steps=1, precision="bf16")
        compute = Compute(model, training, replace(gpu, efficiency=efficiency), Execution())
        forward = compute.layer(Plan(strategy="fake", dp=1), moe=False).parts["core_attn"]
        rows.append(
            {
                "precision": "bf16",
                "length": length,
                "heads": 8,
                "head_size": 64,
                "flops": length * model.attention_flops_per_token(length),
                "forward_s": forward,
                "backward_s": 2.5 * forward / backward,
            }
        )
    return rows


def figures(**changes: Any) -> dict[str, Any]:
    return {
        "torch": "2.9",
        "memory": [
            {"name": "copy", "bytes": 20e9, "s": 1.0},
            {"name": "elementwise", "bytes": 30e9, "s": 1.0},
        ],
        "host": {"layers": 4, "whole_s": 4 * 90e-6, "sharded_s": 4 * 90e-6 + 14 * 500e-6},
        "products": products(tflops=0.2, half_size=10.0, fixed_us=2.0, precision="fp32"),
        "attention": [dict(row, precision="fp32") for row in attention(tflops=0.1, backward=0.5)],
        "collectives": [],
        **changes,
    }


def test_fit_finds_the_coefficients_and_none_below_zero() -> None:
    terms = [[1.0, 2.0], [1.0, 20.0], [1.0, 200.0]]
    assert fit(terms, [3 * a + 0.5 * b for a, b in terms]) == pytest.approx([3.0, 0.5])
    # Falling seconds would need a negative slope.
    assert fit(terms, [3.0, 2.9, 2.8])[1] == 0.0


def test_products_give_back_rate_edges_and_fixed_time() -> None:
    found = fit_products(products(tflops=50.0, half_size=40.0, fixed_us=5.0, precision="bf16"))
    assert (found.tflops, found.half_size, found.fixed_us) == pytest.approx((50.0, 40.0, 5.0))


def test_attention_gives_back_what_the_planner_would_predict() -> None:
    found = fit_attention(attention(tflops=300.0, backward=0.7))
    assert found.tflops == pytest.approx(300.0, rel=0.01)
    assert found.backward == pytest.approx(0.7, rel=0.01)
    assert found.half_tiles == pytest.approx(60.0, rel=0.05)


def test_a_link_gives_back_latency_and_bandwidth() -> None:
    rows = []
    for num_bytes in (1e3, 1e5, 1e7):
        share = num_bytes * 3 / 4
        for name, hops, volume in (
            ("all_gather", 3, share),
            ("reduce_scatter", 3, share),
            ("all_reduce", 4, 2 * share),
            ("exchange", 2, 2 * num_bytes),
        ):
            rows.append({"name": name, "size": 4, "bytes": num_bytes, "s": hops * 50e-6 + volume / 3e9})
    found = fit_link(CPU.links[0], rows)
    assert (found.gb_per_s, found.latency_us, found.efficiency) == (3.0, 50.0, 1.0)
    assert fit_link(CPU.links[0], []) == CPU.links[0]
    # What a switch adds up itself says nothing about the links.
    switched = replace(CPU.links[0], switch_reduction=1.5, start_us=9.0)
    faster = [dict(row, s=row["s"] / (3 if row["name"] == "all_reduce" else 1)) for row in rows]
    again = fit_link(switched, faster)
    assert (again.gb_per_s, again.latency_us, again.start_us, again.switch_reduction) == (3.0, 50.0, 0.0, 1.5)


def test_guesses_give_way_to_what_was_measured() -> None:
    found = to_cluster(CPU, figures(), name="mine", measured=WHEN)
    assert (found.name, found.measured) == ("mine", WHEN)
    assert not found.gpu.peak_is_nominal
    assert found.gpu.peak_tflops == {"fp32": 0.2}
    assert found.gpu.memory_gb_per_s == 20.0
    efficiency = found.gpu.efficiency
    assert efficiency.matmul == {"fp32": 1.0}
    assert (efficiency.matmul_half_size, efficiency.matmul_us) == (10.0, 2.0)
    assert efficiency.memory == 1.5
    assert (efficiency.kernel_us, efficiency.sharding_us) == (1.0, 500.0)
    assert efficiency.attention["flash"] == pytest.approx(0.5, rel=0.01)
    assert efficiency.source == "meshwright probe"
    assert found.links == CPU.links


def test_a_data_sheet_stays_and_shares_of_it_are_measured() -> None:
    known = replace(
        CPU, gpu=replace(CPU.gpu, peak_is_nominal=False, peak_tflops={"fp32": 0.4}, memory_gb_per_s=40.0)
    )
    found = to_cluster(known, figures(), name="mine", measured=WHEN).gpu
    assert (found.peak_tflops, found.memory_gb_per_s) == ({"fp32": 0.4}, 40.0)
    assert found.efficiency.matmul == {"fp32": 0.5}
    assert found.efficiency.memory == 0.75


def test_communication_that_hides_nothing_slows_what_it_runs_beside() -> None:
    def interference(both_s: float) -> float:
        overlap = {"sent_s": 1.0, "computed_s": 2.0, "both_s": both_s}
        return to_cluster(CPU, figures(overlap=overlap), name="x", measured=WHEN).gpu.efficiency.interference

    assert [interference(seconds) for seconds in (2.0, 2.5, 3.0, 4.0)] == [0.0, 0.5, 1.0, 1.0]


def test_one_process_keeps_what_only_several_can_measure() -> None:
    alone = figures(host={"layers": 4, "whole_s": 4 * 90e-6})
    found = to_cluster(CPU, alone, name="x", measured=WHEN).gpu.efficiency
    assert found.sharding_us == CPU.gpu.efficiency.sharding_us
    assert found.interference == CPU.gpu.efficiency.interference
