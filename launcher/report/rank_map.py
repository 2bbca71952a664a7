"""Which rank holds which part: the ranks of every node with their coordinates, and what each group spans."""

from __future__ import annotations

from launcher.cluster.spec import ClusterSpec
from launcher.report.markup import box, label, picture, table
from launcher.report.style import hue
from strategies.spec import Plan

_MOST_NODES, _MOST_RANKS = 16, 16  # drawn; ranks of one node
_LEFT, _TOP, _WIDTH, _HEIGHT = 76.0, 8.0, 104.0, 50.0


def coordinates(plan: Plan, rank: int) -> dict[str, int]:
    """Return the place of a rank in every group, by degree, fastest-varying first."""
    found = {}
    for degree in plan.rank_order:
        size = getattr(plan, degree)
        rank, found[degree] = divmod(rank, size)
    return found


def strides(plan: Plan) -> dict[str, int]:
    """Return how far apart neighbours of a group stand, by degree."""
    found, stride = {}, 1
    for degree in plan.rank_order:
        found[degree] = stride
        stride *= getattr(plan, degree)
    return found


def rank_map(plan: Plan, cluster: ClusterSpec) -> str:
    """Draw the nodes with their ranks, coloured by pipeline stage, or else by data parallel rank."""
    nodes, ranks = min(cluster.num_nodes, _MOST_NODES), min(cluster.gpus_per_node, _MOST_RANKS)
    coloured = "pp" if plan.pp > 1 else "dp"
    told = [degree for degree in plan.rank_order if getattr(plan, degree) > 1] or ["dp"]
    drawn = []
    for node in range(nodes):
        y = _TOP + node * (_HEIGHT + 10)
        drawn.append(label(f"node {node}", x=_LEFT - 8, y=y + 30, anchor="end"))
        for column in range(ranks):
            rank = node * cluster.gpus_per_node + column
            place = coordinates(plan, rank)
            x = _LEFT + column * (_WIDTH + 4)
            words = " ".join(f"{degree}{place[degree]}" for degree in told)
            drawn.append(
                box(x=x, y=y, width=_WIDTH, height=_HEIGHT, kind="cell", title=f"rank {rank}: {words}")
            )
            drawn.append(box(x=x, y=y, width=6, height=_HEIGHT, kind=hue(place[coloured])))
            drawn.append(label(f"rank {rank}", x=x + 12, y=y + 17, kind="label-faint"))
            drawn += _words(words, x=x + 12, y=y + 34)
    chart = picture(
        *drawn,
        name="ranks",
        title="Ranks and nodes",
        description=f"{cut(cluster)} Colours tell {'pipeline stages' if coloured == 'pp' else 'data parallel ranks'}.",
        width=_LEFT + ranks * (_WIDTH + 4) + 8,
        height=_TOP + nodes * (_HEIGHT + 10),
    )
    return chart + _groups(plan, cluster)


def cut(cluster: ClusterSpec) -> str:
    """Say how much of the cluster is drawn."""
    nodes, ranks = min(cluster.num_nodes, _MOST_NODES), min(cluster.gpus_per_node, _MOST_RANKS)
    if (nodes, ranks) == (cluster.num_nodes, cluster.gpus_per_node):
        return f"All {cluster.world_size} ranks are drawn."
    inside = "" if ranks == cluster.gpus_per_node else f", the first {ranks} ranks of each"
    return f"Drawn are the first {nodes} of {cluster.num_nodes} nodes{inside}; the others go on in the same order."


def _words(words: str, *, x: float, y: float) -> list[str]:
    """Break coordinates into two lines where one is too narrow."""
    if len(words) <= 14:
        return [label(words, x=x, y=y + 4)]
    parts = words.split()
    half = (len(parts) + 1) // 2
    return [label(" ".join(parts[:half]), x=x, y=y), label(" ".join(parts[half:]), x=x, y=y + 13)]


def _groups(plan: Plan, cluster: ClusterSpec) -> str:
    rows = []
    for degree, stride in strides(plan).items():
        size = getattr(plan, degree)
        first = ", ".join(str(index * stride) for index in range(min(size, 4))) + (
            ", ..." if size > 4 else ""
        )
        inside = size * stride <= cluster.gpus_per_node
        where = "-" if size == 1 else "one node" if inside else "several nodes"
        speed = "-" if size == 1 else f"{cluster.link_for(size * stride).gb_per_s:g}"
        rows.append((degree, str(size), str(stride), first, where, speed))
    header = ("degree", "ranks", "apart", "the first group", "inside", "slowest link, GB/s")
    experts = f" The {plan.ep} expert parallel ranks are taken out of dp and cp." if plan.ep > 1 else ""
    return table(header, rows, caption=f"Groups of ranks, fastest-varying first.{experts}", words=(0, 3, 4))
