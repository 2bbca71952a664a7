"""For a job script whose job was started again elsewhere: tell the run which hosts of its last start are lost.

`python -m launcher.supervise.lost RUN_DIR HOST ...`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import heartbeat
from launcher.run_dir import RunDir, open_run
from launcher.supervise.failure import Failure, lost_node
from launcher.supervise.told import log_failure


def main(arguments: Sequence[str]) -> int:
    """Log one failure for each host, and say it."""
    run = open_run(Path(arguments[0]))
    for host in arguments[1:]:
        failure = found(run, host)
        log_failure(run, failure, step=None)
        print(f"meshwright: {failure.error}", file=sys.stderr)
    return 0


def found(run: RunDir, host: str) -> Failure:
    """Return the loss of `host`, with the ranks that beat there last."""
    beats = heartbeat.read_all(run.heartbeats, world_size=run.plan().world_size)
    ranks = [beat.rank for beat in beats if beat.host.partition(".")[0] == host.partition(".")[0]]
    return lost_node(
        host, ranks=ranks, why="Slurm calls it down, and has started the run again on other nodes"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
