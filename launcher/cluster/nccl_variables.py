"""The variables that NCCL and PyTorch's NCCL back end read, as data: what each accepts, and who may set it.

Sources: NCCL user guide, "Environment Variables" (docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html), with its
two sections "System configuration" and "Debugging"; PyTorch, "ProcessGroupNCCL Environment Variables"
(docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html); aws-ofi-nccl, doc/efa-env-var.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Fabric: TypeAlias = Literal["infiniband", "roce", "efa", "gcp", "tcp"]

NCCL_GUIDE = "docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
TORCH_GUIDE = "docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html"
EFA_GUIDE = "github.com/aws/aws-ofi-nccl, doc/efa-env-var.md"


@dataclass(frozen=True, kw_only=True)
class Variable:
    """What one variable accepts. `debugging`: the guide keeps it for looking for faults, not for production."""

    lowest: int | None = None
    highest: int | None = None
    accepted: frozenset[str] | None = None  # texts, compared without case; None: any
    default: str | None = None  # setting this is setting nothing
    debugging: bool = False
    advised: frozenset[str] = frozenset()  # values of a debugging variable that NVIDIA's own recipes set


def _number(lowest: int, highest: int | None = None, *, default: str | None = None) -> Variable:
    return Variable(lowest=lowest, highest=highest, default=default)


def _one_of(*accepted: str, default: str | None = None) -> Variable:
    return Variable(accepted=frozenset(accepted), default=default)


def _debugging(default: str | None = None, *, advised: tuple[str, ...] = ()) -> Variable:
    return Variable(default=default, debugging=True, advised=frozenset(advised))


_FREE = Variable()
_SWITCH = _one_of("0", "1")

# "System configuration": for administrators and users of a system, in production.
_SYSTEM = {
    "NCCL_SOCKET_FAMILY": _one_of("AF_INET", "AF_INET6"),
    "NCCL_SOCKET_RETRY_CNT": _number(0),
    "NCCL_SOCKET_RETRY_SLEEP_MSEC": _number(0),
    "NCCL_SOCKET_POLL_TIMEOUT_MSEC": _number(0),
    "NCCL_SOCKET_NTHREADS": _number(1, 16),
    "NCCL_NSOCKS_PERTHREAD": _number(1),
    "NCCL_CROSS_NIC": _number(0, 2, default="2"),
    "NCCL_IB_TIMEOUT": _number(
        0, 31, default="20"
    ),  # 4.096 us * 2^value; 0 and what is out of range wait for ever
    "NCCL_IB_RETRY_CNT": _number(0, 7, default="7"),
    "NCCL_IB_GID_INDEX": _number(-1, default="-1"),
    "NCCL_IB_ADDR_FAMILY": _one_of("AF_INET", "AF_INET6", default="AF_INET"),
    "NCCL_IB_ROCE_VERSION_NUM": _number(1, 2, default="2"),
    "NCCL_IB_SL": _number(0, 15, default="0"),
    "NCCL_IB_TC": _number(0, 255, default="0"),
    "NCCL_IB_FIFO_TC": _number(0, 255),
    "NCCL_IB_RETURN_ASYNC_EVENTS": _SWITCH,
    "NCCL_OOB_NET_ENABLE": _SWITCH,
    "NCCL_UID_STAGGER_THRESHOLD": _number(1),
    "NCCL_UID_STAGGER_RATE": _number(1),
    "NCCL_IGNORE_CPU_AFFINITY": _SWITCH,
    "NCCL_COLLNET_ENABLE": _SWITCH,
    "NCCL_COLLNET_NODE_THRESHOLD": _number(0),
    "NCCL_CTA_POLICY": _FREE,
    "NCCL_SET_THREAD_NAME": _SWITCH,
    "NCCL_DEBUG": _one_of("NONE", "VERSION", "WARN", "INFO", "ABORT", "TRACE"),
    **dict.fromkeys(
        ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_ADDR_RANGE", "NCCL_OOB_NET_IFNAME", "NCCL_NET"), _FREE
    ),
    **dict.fromkeys(
        ("NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_PROFILER_PLUGIN", "NCCL_ENV_PLUGIN", "NCCL_CONF_FILE"),
        _FREE,
    ),
    **dict.fromkeys(("NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_TOPO_FILE", "NCCL_NETDEVS_POLICY"), _FREE),
    # Read by tuners, profilers and the reliability service that come with NCCL, not by its core.
    **dict.fromkeys(("NCCL_TUNER_CONFIG_PATH", "NCCL_TUNER_CONFIG_FILE", "NCCL_RAS_ADDR"), _FREE),
    "NCCL_RAS_ENABLE": _one_of("0", "1", default="1"),
}

# "Debugging": not in production nor in scripts, or only around a fault, and to be taken out again.
_DEBUGGING = {
    "NCCL_P2P_DISABLE": _debugging("0"),
    "NCCL_P2P_DIRECT_DISABLE": _debugging("0"),
    "NCCL_SHM_DISABLE": _debugging("0"),
    "NCCL_NTHREADS": Variable(accepted=frozenset({"64", "128", "256", "512"}), debugging=True),
    "NCCL_IB_DISABLE": _debugging("0"),
    "NCCL_CHECK_POINTERS": _debugging("0"),
    "NCCL_IB_QPS_PER_CONNECTION": Variable(lowest=1, highest=128, default="1", debugging=True),
    "NCCL_IB_SPLIT_DATA_ON_QPS": Variable(lowest=0, highest=1, default="0", debugging=True),
    "NCCL_IB_PCI_RELAXED_ORDERING": Variable(lowest=0, highest=2, default="2", debugging=True),
    "NCCL_IB_ADAPTIVE_ROUTING": _debugging(),
    "NCCL_IB_ECE_ENABLE": _debugging("1"),
    "NCCL_IB_MERGE_NICS": _debugging("1"),
    "NCCL_CUMEM_ENABLE": _debugging(),
    "NCCL_NET_GDR_READ": Variable(lowest=0, highest=1, debugging=True),
    "NCCL_NVB_DISABLE": _debugging("0"),
    "NCCL_PXN_DISABLE": _debugging("0"),
    "NCCL_DMABUF_ENABLE": _debugging("1"),
    # 1 or 2 is the default by version; 0 gives the memory of its buffers back.
    "NCCL_NVLS_ENABLE": Variable(lowest=0, highest=2, debugging=True, advised=frozenset({"0", "1", "2"})),
    "NCCL_GRAPH_REGISTER": _debugging("1", advised=("0",)),
    "NCCL_P2P_NET_CHUNKSIZE": _debugging("131072", advised=("2097152",)),
    "NCCL_MNNVL_ENABLE": Variable(lowest=0, highest=2, default="2", debugging=True),
    "NCCL_RUNTIME_CONNECT": _debugging("1"),
    **dict.fromkeys(
        ("NCCL_P2P_LEVEL", "NCCL_BUFFSIZE", "NCCL_MIN_CTAS", "NCCL_MAX_CTAS", "NCCL_NET_GDR_LEVEL"),
        _debugging(),
    ),
    **dict.fromkeys(
        ("NCCL_ALGO", "NCCL_PROTO", "NCCL_LAUNCH_MODE", "NCCL_IB_AR_THRESHOLD", "NCCL_TOPO_DUMP_FILE"),
        _debugging(),
    ),
    **dict.fromkeys(
        ("NCCL_NET_SHARED_BUFFERS", "NCCL_NET_SHARED_COMMS", "NCCL_P2P_PXN_LEVEL", "NCCL_NET_GDR_C2C"),
        _debugging(),
    ),
    **dict.fromkeys(
        ("NCCL_CUMEM_HOST_ENABLE", "NCCL_LOCAL_REGISTER", "NCCL_LEGACY_CUDA_REGISTER", "NCCL_WIN_ENABLE"),
        _debugging(),
    ),
    **dict.fromkeys(
        ("NCCL_MEM_SYNC_DOMAIN", "NCCL_SET_STACK_SIZE", "NCCL_GRAPH_MIXING_SUPPORT", "NCCL_P2P_LL_THRESHOLD"),
        _debugging(),
    ),
    **dict.fromkeys(
        ("NCCL_ALLOC_P2P_NET_LL_BUFFERS", "NCCL_COMM_BLOCKING", "NCCL_LAUNCH_ORDER_IMPLICIT"), _debugging()
    ),
    **dict.fromkeys(("NCCL_LAUNCH_RACE_FATAL", "NCCL_RAS_TIMEOUT_FACTOR", "NCCL_SYM_CTAS"), _debugging()),
}
NCCL = {**_SYSTEM, **_DEBUGGING}

# PyTorch's and CUDA's own switches that slow every step down, with the value that does.
SLOW_SWITCHES = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_DESYNC_DEBUG": "1",
    "TORCH_NCCL_ENABLE_TIMING": "1",
}

# Old names -> what to do instead. Those that NCCL reads no more do nothing, which is worse than refusing.
REMOVED = {
    "NCCL_RINGS": "NCCL finds its rings itself since 2.4",
    "NCCL_SINGLE_RING_THRESHOLD": "it is gone since NCCL 2.1",
    "NCCL_LL_THRESHOLD": "it is gone since NCCL 2.5",
    "NCCL_TREE_THRESHOLD": "it is gone since NCCL 2.5",
    "NCCL_IB_CUDA_SUPPORT": "use NCCL_NET_GDR_LEVEL, if anything, since NCCL 2.4",
    "NCCL_IB_GDR_LEVEL": "use NCCL_NET_GDR_LEVEL, if anything, since NCCL 2.4",
    "NCCL_NET_GDR_ENABLE": "use NCCL_NET_GDR_LEVEL, if anything",
}
DEPRECATED = {
    "NCCL_MIN_NCHANNELS": "NCCL_MIN_CTAS is its name since NCCL 2.17",
    "NCCL_MAX_NCHANNELS": "NCCL_MAX_CTAS is its name since NCCL 2.17",
    "NCCL_CHECKS_DISABLE": "NCCL_CHECK_POINTERS=0 is the default since NCCL 2.2",
    "NCCL_CGA_CLUSTER_SIZE": "leave it to NCCL",
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING is its name since PyTorch 2.2",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT is its name since PyTorch 2.2",
    "NCCL_DESYNC_DEBUG": "TORCH_NCCL_DESYNC_DEBUG is its name since PyTorch 2.2",
    "NCCL_ENABLE_TIMING": "TORCH_NCCL_ENABLE_TIMING is its name since PyTorch 2.2",
}

# Families of names that belong to somebody else: vendors' plug-ins, builds of NCCL, tools beside it.
FOREIGN_PREFIXES = (
    *(
        "NCCL_FASTRAK_",
        "NCCL_GPUDIRECTTCPX_",
        "NCCL_SHIMNET_",
        "NCCL_INSPECTOR_",
        "NCCL_PROFILE_",
        "NCCL_RCCL_",
    ),
    *("NCCL_HOME", "NCCL_ROOT", "NCCL_DIR", "NCCL_LIB", "NCCL_INCLUDE", "NCCL_VERSION", "NCCL_PLUGIN_P2P"),
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a vendor's plug-in or image needs set although the guide keeps it for debugging."""

    vendor: str
    needs: frozenset[str]
    source: str


PROFILES: dict[Fabric, Profile] = {
    "efa": Profile(
        vendor="AWS EFA",
        needs=frozenset({"NCCL_PROTO", "NCCL_TUNER_PLUGIN", "NCCL_NVLS_ENABLE"}),
        source=EFA_GUIDE,
    ),
    "gcp": Profile(
        vendor="GCP GPUDirect-TCPXO",
        needs=frozenset(
            {
                *("NCCL_PROTO", "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_NET_GDR_LEVEL", "NCCL_P2P_NET_CHUNKSIZE"),
                *(
                    "NCCL_P2P_PCI_CHUNKSIZE",
                    "NCCL_P2P_NVL_CHUNKSIZE",
                    "NCCL_DYNAMIC_CHUNK_SIZE",
                    "NCCL_MIN_ZCOPY",
                ),
                *("NCCL_USE_SNAP", "NCCL_FASTRAK_USE_SNAP"),
            }
        ),
        source="cloud.google.com/kubernetes-engine/docs/how-to/gpu-bandwidth-gpudirect-tcpx",
    ),
}
# Azure's images name a topology file and allow relaxed ordering; the file's name tells of them.
AZURE_NEEDS = frozenset({"NCCL_IB_PCI_RELAXED_ORDERING"})

# What names things of one host, and so may differ between hosts.
OF_A_HOST = frozenset(
    {"NCCL_SOCKET_IFNAME", "NCCL_OOB_NET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE"}
)

# Variables that only the plug-in of one fabric reads; elsewhere they were copied from somebody else's script.
OWNED_BY: dict[str, Fabric] = {
    "FI_PROVIDER": "efa",
    "FI_EFA_": "efa",
    "OFI_NCCL_": "efa",
    "NCCL_FASTRAK_": "gcp",
    "NCCL_GPUDIRECTTCPX_": "gcp",
    "NCCL_SHIMNET_": "gcp",
}
# What EFA's own guide says not to set (any more).
EFA_STALE = {
    "RDMAV_FORK_SAFE": "libfabric 1.18 and later need no fork safety",
    "FI_EFA_FORK_SAFE": "libfabric 1.18 and later need no fork safety",
    "FI_EFA_USE_DEVICE_RDMA": "libfabric 1.18 and aws-ofi-nccl 1.7 and later find it out themselves",
}
