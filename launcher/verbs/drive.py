"""One host's way through a frozen run: its ranks, the questions asked afterwards, and what there is to tell."""

from __future__ import annotations

import os

from launcher.cluster import placement
from launcher.errors import FINISHED
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.supervise.follower import follow
from launcher.supervise.supervisor import run_workers
from launcher.verbs import checks, see, show


def drive(run: RunDir, output: Output, *, node: int = 0) -> int:
    """Run the workers of host number `node` to the end of the run; return the exit code."""
    cluster = run.job().cluster
    if cluster.gpu.device == "cuda" and cluster.gpus_per_node > 1:
        placement.place(os.environ)  # the workers inherit it
    if node > 0:
        code = follow(run, node=node, quiet_stdout=output.as_json)
    else:
        code = run_workers(run, quiet_stdout=output.as_json)
        if code == FINISHED and show.describe(run)["state"] == "finished":
            checks.check(run, quiet_stdout=output.as_json, say=output.say)
    see.tell(run, output)
    return code
