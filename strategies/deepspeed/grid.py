"""Who is where: DeepSpeed's grid of pipeline stages, data parallel and tensor parallel ranks, in plan.rank_order.

It imports DeepSpeed; import it late.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import groups

from strategies.spec import Plan


def topology_of(plan: Plan) -> PipeModelDataParallelTopology:
    """Return the axes, stages outermost and tensor parallel ranks next to each other."""
    return PipeModelDataParallelTopology(num_pp=plan.pp, num_mp=plan.tp, num_dp=plan.dp)


def open_grid(plan: Plan) -> Any:
    """Open the groups of every axis; the grid answers what DeepSpeed asks its `mpu`."""
    with redirect_stdout(StringIO()):  # it prints its topology
        return PipelineParallelGrid(topology=topology_of(plan))


def forget_groups() -> None:
    """Let the next engine of this process open groups of its own."""
    groups._release_process_group_references()
