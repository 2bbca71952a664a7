"""Which rank goes where: hosts in the order of the switches above them, GPUs in the order of their islands.

For a job script: `python -m launcher.cluster.placement hosts GROUP` reads host names and `scontrol show topology` and
prints the hosts, one a line; `... devices` prints this node's GPUs in order, for CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence

from launcher.cluster import detect, gpu_matrix, switches
from launcher.cluster.gpu_matrix import GpuMatrix
from strategies.spec import Plan


def hosts_in_a_group(plan: Plan, *, gpus_per_node: int) -> int:
    """Return how many neighbouring hosts talk most: those that one rank of the slowest-varying degree spans.

    With the usual order these are the data parallel ranks of one pipeline stage.
    """
    used = [axis for axis in plan.rank_order if getattr(plan, axis) > 1]
    return max(1, plan.stride(used[-1]) // gpus_per_node) if used else 1


def hosts(text: str, *, group: int) -> tuple[str, ...]:
    """Order the host names in `text`, a line each, by the topology that follows them."""
    lines = text.splitlines()
    names = [line.strip() for line in lines if line.strip() and "=" not in line]
    tree = switches.parse("\n".join(line for line in lines if "=" in line))
    return switches.order(names, tree.switches, group=group)


def devices(matrix: GpuMatrix | None, environ: Mapping[str, str]) -> str | None:
    """Return CUDA_VISIBLE_DEVICES that puts islands of NVLink side by side; None where nothing has to change.

    A list that is set keeps its devices. One of UUIDs, or of a part of a device, stays as it is.
    """
    if matrix is None:
        return None
    order = [str(index) for index in gpu_matrix.device_order(matrix)]
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(sorted(order, key=int))).split(",")
    if not set(visible) <= set(order):
        return None
    wanted = [index for index in order if index in visible]
    return ",".join(wanted) if wanted != visible else None


def place(environ: MutableMapping[str, str]) -> None:
    """Put this node's GPUs in the order of their islands, for processes that inherit `environ`."""
    ordered = devices(detect.query_matrix(), environ)
    if ordered is not None:
        environ.update({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ordered})


def main(arguments: Sequence[str]) -> int:
    """Serve the job script."""
    if arguments[0] == "hosts":
        print("\n".join(hosts(sys.stdin.read(), group=int(arguments[1]))))
    else:
        print(devices(detect.query_matrix(), os.environ) or "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
