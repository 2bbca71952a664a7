#!/usr/bin/env bash
# Stop what start.sh has started, by pid, and nothing else. --purge removes its state and logs as well.
set -uo pipefail
dir=${TEST_CLUSTER_DIR:-/tmp/meshwright-test-cluster}
export SLURM_CONF="$dir/etc/slurm.conf"
[ -d "$dir/pid" ] || exit 0
exec 9>"$dir/lock"
flock 9

pid_of() { # NAME, whose part before the dot is the program
    local pid
    pid=$(cat "$dir/pid/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%.*}" ] && echo "$pid"
}
descendants() {
    local child
    for child in $(pgrep -P "$1"); do descendants "$child"; done
    echo "$1"
}
stop() {
    local name pid pids=()
    for name in "$@"; do
        if pid=$(pid_of "$name"); then
            kill -TERM "$pid" 2>/dev/null
            pids+=("$pid")
        fi
        rm -f "$dir/pid/$name.pid"
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        for _ in $(seq 200); do
            [ -d "/proc/$pid" ] || break
            sleep 0.05
        done
        if [ -d "/proc/$pid" ]; then kill -KILL "$pid" 2>/dev/null; fi
    done
}

# Jobs first, so that no step outlives its slurmd.
if pid_of slurmctld >/dev/null; then
    for state in PENDING RUNNING SUSPENDED; do timeout 5 scancel --quiet --state=$state 2>/dev/null; done
    for _ in $(seq 100); do
        [ -z "$(timeout 2 squeue -h -o %i 2>/dev/null)" ] && break
        sleep 0.1
    done
fi
# Steps that a killed slurmd left behind carry our configuration in their environment.
for pid in $(pgrep -x slurmstepd); do
    { tr '\0' '\n' <"/proc/$pid/environ"; } 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
    for child in $(descendants "$pid"); do kill -KILL "$child" 2>/dev/null; done
done
daemons=()
for file in "$dir"/pid/slurmd.*.pid; do [ -e "$file" ] && daemons+=("$(basename "$file" .pid)"); done
stop slurmctld ${daemons[@]+"${daemons[@]}"} # all at once: a slurmd takes two seconds
stop munged
mark="# meshwright-test-cluster $dir;"
if grep -qF "$mark" /etc/hosts; then
    hosts=$(grep -vF "$mark" /etc/hosts)
    printf '%s\n' "$hosts" >/etc/hosts
fi
[ "${1:-}" != --purge ] || rm -rf "$dir"
exit 0
