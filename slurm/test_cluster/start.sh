#!/usr/bin/env bash
# A real Slurm on this one host, for tests: munged, slurmctld and one slurmd for each emulated node.
# Debian 12 or Ubuntu, as root, without systemd or cgroups. Run again, it repairs: daemons that died are started anew.
# Prints one line to eval: export SLURM_CONF=...
set -euo pipefail
dir=${TEST_CLUSTER_DIR:-/tmp/meshwright-test-cluster} # configuration, state, logs, pids
nodes=${TEST_CLUSTER_NODES:-4}
cpus=${TEST_CLUSTER_CPUS:-16}          # that each node claims; nothing checks
memory=${TEST_CLUSTER_MEMORY:-1000000} # MiB that each node claims
gpus=${TEST_CLUSTER_GPUS:-8}           # that do not exist
kind=${TEST_CLUSTER_GPU_KIND:-h100}
port=${TEST_CLUSTER_PORT:-36817} # of slurmctld; slurmd i takes port + 11 + i
wait_s=${TEST_CLUSTER_WAIT_S:-90}

[ "$(id -u)" = 0 ] || { echo "start.sh: Slurm's daemons are started by root" >&2; exit 2; }
mkdir -p "$dir"/{etc,pid,log,state,spool,munge,dev}
exec 9>"$dir/lock"
flock 9

# ---- programs: eight packages, 3.5 MB; what they recommend would be 43
tools=(slurmctld slurmd sbatch munged)
if [ "$(command -v "${tools[@]}" | wc -l)" != "${#tools[@]}" ]; then
    packages=(slurmctld slurmd slurm-client munge)
    export DEBIAN_FRONTEND=noninteractive
    {
        apt-get install -y --no-install-recommends "${packages[@]}" ||
            { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }
    } >&2
fi

# ---- names: each node has its own hostname where that is allowed, else all share this host's
host=$(hostname -s)
own_names=
unshare --uts true 2>/dev/null && own_names=1
address() {
    if [ -n "$own_names" ]; then echo "127.0.1.$((10 + $1))"; else echo 127.0.0.1; fi
}
last=$((nodes - 1))
half=$((nodes / 2))
mark="# meshwright-test-cluster $dir;" # several may run side by side
hosts=$(grep -vF "$mark" /etc/hosts || true)
for ((i = 0; i < nodes; i++)); do hosts+=$'\n'"$(address $i) node$i $mark"; done
printf '%s\n' "$hosts" >/etc/hosts # written in place: in a container it is a mount

# ---- configuration
chmod 755 "$dir" "$dir"/{etc,pid,log,dev}
chmod 711 "$dir/munge"
for ((g = 0; g < gpus; g++)); do ln -sfn /dev/null "$dir/dev/gpu$g"; done # Slurm wants character devices
[ -s "$dir/munge/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/munge.key")
node_lines() {
    local i
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=node$i NodeAddr=$(address $i) Port=$((port + 11 + i))"
    done
}
cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits: 120 s unless said otherwise.
AuthInfo=socket=$dir/munge/munge.socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pid/slurmctld.self
SlurmdPidFile=$dir/pid/slurmd.%n.self
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
# No cgroups, no systemd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
# What is claimed here wins over what slurmd finds.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
TopologyPlugin=topology/tree
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
MessageTimeout=20
ReturnToService=1
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
NodeName=DEFAULT CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory Gres=gpu:$kind:$gpus Feature=$kind State=UNKNOWN
$(node_lines)
PartitionName=gpu Nodes=node[0-$last] Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
CONF
cat >"$dir/etc/gres.conf" <<CONF
AutoDetect=off
NodeName=node[0-$last] Name=gpu Type=$kind File=$dir/dev/gpu[0-$((gpus - 1))]
CONF
if [ "$half" -ge 1 ]; then
    cat >"$dir/etc/topology.conf" <<CONF
SwitchName=leaf0 Nodes=node[0-$((half - 1))]
SwitchName=leaf1 Nodes=node[$half-$last]
SwitchName=spine0 Switches=leaf[0-1]
CONF
else
    echo 'SwitchName=leaf0 Nodes=node0' >"$dir/etc/topology.conf"
fi
: >"$dir/etc/plugstack.conf"
export SLURM_CONF="$dir/etc/slurm.conf"

# ---- daemons
is_alive() { # NAME PROGRAM
    local pid
    pid=$(cat "$dir/pid/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]
}
start() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 9>&- &
    echo $! >"$dir/pid/$name.pid"
    disown
}
socket=$dir/munge/munge.socket
if ! is_alive munged munged; then
    rm -f "$socket"*
    start munged munged -F --force --key-file="$dir/munge/munge.key" --socket="$socket" \
        --pid-file="$dir/munge/munged.self" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/munged.seed"
fi
for _ in $(seq 200); do
    munge -n -S "$socket" >/dev/null 2>&1 && break
    sleep 0.05
done
if is_alive slurmctld slurmctld; then scontrol reconfigure; else start slurmctld slurmctld -D -i -f "$SLURM_CONF"; fi
for ((i = 0; i < nodes; i++)); do
    mkdir -p "$dir/spool/node$i"
    is_alive "slurmd.node$i" slurmd && continue
    command=(slurmd -D -N "node$i" -f "$SLURM_CONF")
    # shellcheck disable=SC2016 # the inner shell is to expand them
    [ -z "$own_names" ] || command=(unshare --uts sh -c 'hostname "$0" && exec "$@"' "node$i" "${command[@]}")
    start "slurmd.node$i" "${command[@]}"
done

# ---- until every node answers
deadline=$((SECONDS + wait_s))
until [ "$(sinfo -h -N -p gpu -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated')" = "$nodes" ]; do
    if [ $SECONDS -ge $deadline ] || ! is_alive slurmctld slurmctld; then
        echo "start.sh: the nodes are not ready after $wait_s s, or slurmctld died; see $dir/log" >&2
        sinfo -N -p gpu >&2 || true
        exit 1
    fi
    sleep 0.1
done
echo "export SLURM_CONF='$SLURM_CONF'"
