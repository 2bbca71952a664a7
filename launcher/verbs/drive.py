"""One host's way through a frozen run: its ranks, the questions asked afterwards, and what there is to tell."""

from __future__ import annotations

import os

from launcher.cluster import placement
from launcher.errors import FINISHED
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.supervise.follower import follow
from launcher.supervise.supervisor import run_workers
from launcher.verbs import checks, preflight, see, show


def work(run: RunDir, output: Output, *, node: int = 0) -> int:
    """Train a frozen run with this host's GPUs in their order, as its host number `node`; return the exit code."""
    if run.job().submit.preflight:
        preflight.require(run)
    cluster = run.job().cluster
    if cluster.gpu.device == "cuda" and cluster.gpus_per_node > 1:
        placement.place(os.environ)  # the workers inherit it
    if node > 0:
        return follow(run, node=node, quiet_stdout=output.as_json)
    return run_workers(run, quiet_stdout=output.as_json)


def drive(run: RunDir, output: Output, *, node: int = 0) -> int:
    """Take this host through the run to its end, and tell of it; return the exit code."""
    code = work(run, output, node=node)
    if node == 0 and code == FINISHED and show.describe(run)["state"] == "finished":
        checks.check(run, quiet_stdout=output.as_json, say=output.say)
    see.tell(run, output)
    return code
