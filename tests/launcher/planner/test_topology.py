"""A change of node size, network or topology changes the plan, each for its own reason; through the whole planner.

The changes are larger than real ones, so that the answers do not hang on the last digits of the cost model.
"""

from __future__ import annotations

from dataclasses import replace

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.problem import PlanRequest
from launcher.planner.search.ranking import rank
from strategies.model_spec import ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

GPU = GpuSpec(
    name="G",
    memory_gib=79.0,
    memory_gb_per_s=3350.0,
    peak_tflops={"fp32": 67.0, "bf16": 989.0, "fp16": 989.0},
)
LARGE_GPU = replace(GPU, memory_gib=184.0, memory_gb_per_s=8000.0, peak_tflops={"fp32": 80.0, "bf16": 2500.0})
NODE = Link(
    name="node",
    size=8,
    within_node=True,
    gb_per_s=450.0,
    efficiency=0.8,
    start_us=40.0,
    latency_us=2.5,
    switch_reduction=0.75,
)
NETWORK = Link(name="network", size=None, gb_per_s=50.0, efficiency=0.9, start_us=45.0, latency_us=15.0)
# 64 GPUs in racks or in nodes of eight, with a quarter of a usual network between them.
RACK = replace(NODE, size=72, within_node=False, gb_per_s=900.0)
SLOW = replace(NETWORK, gb_per_s=12.5)


def cluster(*links: Link, nodes: int, gpus_per_node: int = 8, gpu: GpuSpec = GPU) -> ClusterSpec:
    return ClusterSpec(
        name="c",
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        links=links,
        host_memory_gib=1900.0,
        reserved_gib=3.0,
    )


def llama(num_layers: int, hidden_size: int, heads: int, ffn: int, moe: MoeSpec | None = None) -> ModelSpec:
    return ModelSpec(
        name="m",
        model_type="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_kv_heads=8,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        max_position_embeddings=2**20,
        gated_mlp=True,
        tied_embeddings=False,
        norm="rmsnorm",
        moe=moe,
    )


SMALL, MIDDLE, LARGE = (
    llama(32, 4096, 32, 14336),
    llama(80, 8192, 64, 28672),
    llama(128, 16384, 128, 53248),
)
EXPERTS = llama(48, 4096, 64, 12288, MoeSpec(num_experts=128, top_k=8, expert_ffn_hidden_size=1536))


def chosen(
    model: ModelSpec,
    where: ClusterSpec,
    *,
    batch: int,
    length: int = 8192,
    strategy: str = "megatron",
    request: PlanRequest | None = None,
) -> Plan:
    training = TrainingSpec(sequence_length=length, global_batch_size=batch, num_steps=10)
    return rank(model, where, training, request or PlanRequest(), strategies=[strategy]).choose().plan


def test_nodes_of_four_cap_tensor_parallelism_at_four() -> None:
    """Two all-reduces a layer and pass do not leave the fast links."""
    eight = chosen(LARGE, cluster(NODE, NETWORK, nodes=64), batch=512)
    four = chosen(LARGE, cluster(NODE, NETWORK, nodes=128, gpus_per_node=4), batch=512)
    assert (eight.tp, four.tp) == (8, 4)


def test_a_slow_network_turns_data_parallelism_into_a_pipeline() -> None:
    """Stages exchange hidden states once a micro-batch, replicas all gradients."""
    fast = chosen(SMALL, cluster(NODE, NETWORK, nodes=8), batch=256, strategy="fake")
    slow_links = (NODE, replace(NETWORK, gb_per_s=0.5))
    slow = chosen(SMALL, cluster(*slow_links, nodes=8), batch=256, strategy="fake")
    assert fast.pp == 1 < slow.pp
    assert slow.dp < fast.dp


def test_a_rack_of_fast_links_lets_tensor_parallelism_leave_the_node() -> None:
    """With a batch of eight there is nothing else to split; sixteen ranks a layer need no recomputation."""
    rack = chosen(LARGE, cluster(RACK, NETWORK, nodes=16, gpus_per_node=4, gpu=LARGE_GPU), batch=8)
    node = chosen(LARGE, cluster(replace(RACK, size=8), NETWORK, nodes=8, gpu=LARGE_GPU), batch=8)
    assert node.tp <= 8 < rack.tp


def test_a_rack_of_fast_links_spreads_the_experts() -> None:
    """All-to-alls of eight copies a token stay where links are fast: eight ranks, or all 64 that a rack gives."""
    pins = PlanRequest(tp=1, cp=1)
    rack = chosen(
        EXPERTS,
        cluster(RACK, SLOW, nodes=16, gpus_per_node=4, gpu=LARGE_GPU),
        batch=1024,
        length=4096,
        request=pins,
    )
    node = chosen(
        EXPERTS,
        cluster(replace(RACK, size=8), SLOW, nodes=8, gpu=LARGE_GPU),
        batch=1024,
        length=4096,
        request=pins,
    )
    assert node.ep <= 8 < 16 <= rack.ep


def test_an_oversubscribed_spine_keeps_replicas_under_one_leaf() -> None:
    """Above 16 ranks a leaf, only messages between stages cross: one leaf holds all replicas of a stage."""
    leaf = replace(NETWORK, size=16, name="leaf")
    spine = replace(NETWORK, gb_per_s=50 / 64, shared_by=64.0, name="spine")
    flat = chosen(MIDDLE, cluster(NODE, NETWORK, nodes=32), batch=512, length=4096)
    split = chosen(MIDDLE, cluster(NODE, leaf, spine, nodes=32), batch=512, length=4096)
    assert split.tp * split.cp * split.dp <= 16 < flat.tp * flat.cp * flat.dp


def test_a_slow_network_keeps_pieces_of_a_sequence_in_the_node() -> None:
    """Keys and values go round the ring in every layer, so the ring stays where links are fast."""
    fast = chosen(SMALL, cluster(NODE, NETWORK, nodes=8), batch=4, length=131072)
    slow_links = (NODE, replace(NETWORK, gb_per_s=1.0))
    slow = chosen(SMALL, cluster(*slow_links, nodes=8), batch=4, length=131072)
    assert slow.tp * slow.cp <= 8 < fast.tp * fast.cp


def test_links_by_pairs_have_no_room_for_a_few_ranks() -> None:
    """Two or four GPUs of a mesh of eight reach one or three sevenths of its bandwidth, all or none lose nothing."""
    switch = chosen(MIDDLE, cluster(NODE, NETWORK, nodes=8, gpu=LARGE_GPU), batch=256)
    mesh_links = (replace(NODE, mesh=True, switch_reduction=None), NETWORK)
    mesh = chosen(MIDDLE, cluster(*mesh_links, nodes=8, gpu=LARGE_GPU), batch=256)
    assert switch.tp in (2, 4)
    assert mesh.tp in (1, 8)
