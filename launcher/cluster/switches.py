"""How nodes hang together above the node: switches (Slurm's tree or blocks, or a YAML), and what follows for links."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.cluster.hostlist import expand, natural
from launcher.cluster.spec import Link, Switch

_FIELD = re.compile(r"(\w+)=(\S*)")


@dataclass(frozen=True, kw_only=True)
class SwitchTree:
    """Switches of `scontrol show topology`. `blocks`: their leaves are domains of NVLink, not switches."""

    switches: tuple[Switch, ...] = ()
    blocks: bool = False


def parse(text: str) -> SwitchTree:
    """Read `scontrol show topology`: topology/tree (SwitchName=) or topology/block (BlockName=)."""
    switches: dict[str, Switch] = {}
    blocks: dict[str, Switch] = {}
    for line in text.splitlines():
        fields = dict(_FIELD.findall(line))
        hosts = expand(fields.get("Nodes", ""))
        if "SwitchName" in fields:
            below = expand(fields.get("Switches", ""))
            # Slurm repeats all nodes below on each level.
            switches[fields["SwitchName"]] = Switch(
                name=fields["SwitchName"], hosts=() if below else hosts, switches=below
            )
        elif "BlockName" in fields:
            blocks[fields["BlockName"]] = Switch(name=fields["BlockName"], hosts=hosts)
        elif "AggregatedBlock" in fields:
            name = fields["AggregatedBlock"]
            blocks[name] = Switch(name=name, switches=expand(name))
    return SwitchTree(switches=tuple((blocks or switches).values()), blocks=bool(blocks))


def order(hosts: Sequence[str], switches: Iterable[Switch], *, group: int = 1) -> tuple[str, ...]:
    """Return `hosts` so that neighbours share the lowest switch they can, and groups of `group` hosts stay whole.

    Ranks are numbered along it, so what talks most (tensor, then data parallel ranks of one stage) should fit in
    `group` neighbours. Under each switch those children come first whose hosts fill whole groups, larger ones first;
    the rest are left over together. Hosts that no switch names come last, by name.
    """
    tree = {switch.name: switch for switch in switches}
    wanted, placed = set(hosts), set[str]()
    inner = {name for switch in tree.values() for name in switch.switches}

    def under(name: str) -> list[str]:
        switch = tree.get(name)
        if switch is None:
            return []
        own = sorted((h for h in switch.hosts if h in wanted and h not in placed), key=natural)
        placed.update(own)
        return own + _merge([(child, under(child)) for child in switch.switches], group)

    roots = [name for name in tree if name not in inner]
    arranged = _merge([(root, under(root)) for root in roots], group)
    return (*arranged, *sorted(wanted - placed, key=natural))


def _merge(children: Iterable[tuple[str, list[str]]], group: int) -> list[str]:
    filled = [(name, below) for name, below in children if below]
    filled.sort(key=lambda child: (len(child[1]) % group, -len(child[1]), natural(child[0])))
    return [host for _, below in filled for host in below]


def heights(switches: Iterable[Switch]) -> dict[str, int]:
    """Return each switch's height: 0 joins hosts, 1 joins those, and so on."""
    tree = {switch.name: switch for switch in switches}

    def height(name: str) -> int:
        below = [height(child) + 1 for child in tree[name].switches if child in tree]
        return max(below, default=0)

    return {name: height(name) for name in tree}


def tiers(
    links: Sequence[Link],
    switches: Sequence[Switch],
    *,
    gpus_per_node: int,
    blocks: bool = False,
    hosts: Iterable[str] | None = None,
) -> tuple[Link, ...]:
    """Return `links` with one tier for each height of switches whose uplinks are oversubscribed.

    `links` ends with the network as one GPU sees it through the lowest switch. Blocks bound the domain of NVLink
    instead. `hosts`: those that count; None: all.
    """
    joined = _joined(switches, None if hosts is None else set(hosts))
    level = heights(switches)
    if blocks:
        smallest = min((n for name, n in joined.items() if level[name] == 0 and n), default=0)
        bounded = [
            replace(link, size=smallest * gpus_per_node)
            if smallest and link.size and not link.within_node
            else link
            for link in links
        ]
        return tuple(bounded)
    inside, network = list(links[:-1]), links[-1]
    factor = 1.0
    for height in range(max(level.values(), default=0)):
        here = [switch for switch in switches if level[switch.name] == height and joined[switch.name]]
        step = max((switch.oversubscription for switch in here), default=1.0)
        if step > 1:
            reach = min(joined[switch.name] for switch in here) * gpus_per_node
            inside.append(_slower(network, factor, size=reach))
            factor *= step
    return (*inside, _slower(network, factor, size=network.size))


def _slower(network: Link, factor: float, *, size: int | None) -> Link:
    # A few GPUs of many reach the full rate even through a thin uplink: Link.shared_by says so.
    return replace(
        network, size=size, gb_per_s=network.gb_per_s / factor, shared_by=network.shared_by * factor
    )


def _joined(switches: Sequence[Switch], wanted: set[str] | None) -> Mapping[str, int]:
    tree = {switch.name: switch for switch in switches}

    def below(name: str) -> set[str]:
        switch = tree.get(name)
        if switch is None:
            return set()
        found = set(switch.hosts).union(*(below(child) for child in switch.switches))
        return found if wanted is None else found & wanted

    return {name: len(below(name)) for name in tree}
