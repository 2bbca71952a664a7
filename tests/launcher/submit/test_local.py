from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from launcher.errors import ClusterError
from launcher.submit import local


def test_one_process_needs_no_torchrun() -> None:
    argv = local.argv(run_dir=Path("/r"), num_processes=1, port=None)
    assert argv == [sys.executable, "-m", "launcher.training.worker", "/r"]


def test_more_processes_meet_on_loopback() -> None:
    argv = local.argv(run_dir=Path("/r"), num_processes=4, port=12345)
    assert argv[1:] == [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:12345",
        "--rdzv-id=meshwright",
        "--local-addr=127.0.0.1",
        "-m",
        "launcher.training.worker",
        "/r",
    ]


def test_environment_keeps_what_the_user_set() -> None:
    made = local.environment({"OMP_NUM_THREADS": "7"}, num_processes=2, num_cores=8)
    assert made["OMP_NUM_THREADS"] == "7"
    assert made["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert local.environment({}, num_processes=2, num_cores=8)["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("interface", "told"), [("lo", "lo"), ("eth3", "eth3"), (None, None)])
def test_ranks_talk_over_the_interface_that_leads_to_them(interface: str | None, told: str | None) -> None:
    made = local.environment({}, num_processes=2, num_cores=8, interface=interface)
    assert made.get("GLOO_SOCKET_IFNAME") == told
    set_by_a_person = {"GLOO_SOCKET_IFNAME": "ib0"}
    kept = local.environment(set_by_a_person, num_processes=2, num_cores=8, interface=interface)
    assert kept["GLOO_SOCKET_IFNAME"] == "ib0"


def test_another_python_starts_the_workers_and_sees_nothing_of_ours() -> None:
    for processes in (1, 2):
        assert (
            local.argv(run_dir=Path("/r"), num_processes=processes, port=None, python="/o/python")[0]
            == "/o/python"
        )
    given = {"PYTHONPATH": "/mine", "HOME": "/h"}
    ours = local.environment(given, num_processes=1, num_cores=1)
    assert ours["PYTHONPATH"].endswith(":/mine")
    other = local.environment(given, num_processes=1, num_cores=1, python="/o/python")
    assert "/mine" not in other["PYTHONPATH"]
    assert (other["HOME"], other["TOKENIZERS_PARALLELISM"]) == ("/h", "false")


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"submit.port={port} cannot be used on this host"):
            local.check_port(port)
    with pytest.raises(ClusterError, match=r"submit\.port=99999 is not a port"):
        local.check_port(99999)
    local.check_port(None)


def test_another_module_may_be_started_the_same_way() -> None:
    one = local.argv(run_dir=Path("x"), num_processes=1, port=None, module="launcher.verbs.probe_worker")
    two = local.argv(run_dir=Path("x"), num_processes=2, port=None, module="launcher.verbs.probe_worker")
    assert one[1:] == two[-3:] == ["-m", "launcher.verbs.probe_worker", "x"]


def test_the_flight_recorder_writes_beside_the_logs() -> None:
    made = local.flight_recorder(Path("/r/logs"))
    assert made["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(made["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0
    assert made["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] == "/r/logs/nccl_pipe_rank_"
