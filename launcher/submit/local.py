"""Start the workers of a frozen run on this host: a pure argv and environment, and nothing else."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.cluster import detect
from launcher.cluster.spec import ClusterSpec
from launcher.environments.interpreter import surroundings
from launcher.errors import ClusterError
from strategies import ENGINE_PACKAGES
from strategies.spec import Plan

EXPORT = "--export"  # before the folder, behind RUN_DIR: the workers write the weights and leave
LAUNCHER_PID = "MESHWRIGHT_LAUNCHER_PID"  # told to the workers, who stop when it is gone


def argv(
    *,
    run_dir: Path,
    num_processes: int,
    port: int | None,
    module: str = "launcher.training.worker",
    python: str = sys.executable,
) -> list[str]:
    """Command line of the workers: plain Python for one process, torchrun for more."""
    worker = ["-m", module, str(run_dir)]
    if num_processes == 1:
        return [python, *worker]
    return [
        *[python, "-m", "torch.distributed.run"],
        f"--nproc-per-node={num_processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port or 0}",
        "--rdzv-id=meshwright",
        "--local-addr=127.0.0.1",
        *worker,
    ]


def environment(
    inherited: Mapping[str, str],
    *,
    num_processes: int,
    num_cores: int,
    python: str = sys.executable,
    interface: str | None = "lo",  # to the other ranks; None: gloo looks up the address of the host's name
) -> dict[str, str]:
    """What the workers of this host inherit, and the few variables they need. Values that are set stay."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores // num_processes)),
        # A restarted group must not read the keys of its predecessor: pytorch/pytorch#135712.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if sys.platform == "linux" and interface is not None:
        defaults["GLOO_SOCKET_IFNAME"] = interface
    return {**defaults, **surroundings(inherited, python)}


def flight_recorder(logs: Path) -> dict[str, str]:
    """Let NCCL's watchdog write the last collectives of each rank, when one times out and when its pipe says so."""
    return {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # collectives remembered; older versions of PyTorch: none
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(logs / "nccl_trace_rank_"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(logs / "nccl_pipe_rank_"),
    }


def check_port(port: int | None) -> None:
    """Raise when the rendezvous port that the user pinned is taken."""
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ClusterError(f"submit.port={port} is not a port; use 1 to 65535, or null for a free one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"submit.port={port} cannot be used on this host ({error.strerror}); "
                "choose another, or null for a free one"
            ) from error


def check_host(cluster: ClusterSpec, plan: Plan, *, start: str) -> None:
    """Raise unless this host alone can run the plan; `start` says what each of several nodes has to run, and `."""
    if cluster.num_nodes > 1:
        raise ClusterError(
            f"cluster.num_nodes={cluster.num_nodes} needs a start on every node: `meshwright submit` with "
            "submit=slurm, submit=ssh or submit=torchrun makes and supervises them, or run there `torchrun "
            f"--nnodes={cluster.num_nodes} --nproc-per-node={cluster.gpus_per_node} --rdzv-backend=c10d "
            f"--rdzv-endpoint=HOST:PORT -m launcher {start}"
        )
    check_gpus(cluster, plan)


def check_gpus(cluster: ClusterSpec, plan: Plan) -> None:
    """Raise unless this host has the GPUs that the plan gives each node."""
    if cluster.gpu.device == "cuda" and plan.strategy in ENGINE_PACKAGES:
        found = len(detect.visible_gpus())
        if found < cluster.gpus_per_node:
            raise ClusterError(
                f"cluster.gpus_per_node={cluster.gpus_per_node} of {cluster.gpu.name} are planned and this host "
                f"shows {found} GPUs; use cluster=local to train on what is here (`plan` works anywhere)"
            )
