#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a veth pair that lets through so much and no more (tc tbf).
# Linux, as root. The hosts share the file system, and each has a name of its own where that is allowed.
#   two_hosts.sh up NAME RATE              NAME-a and NAME-b, at 10.219.91.1 and .2; RATE as tc writes it: 400mbit
#   two_hosts.sh run NAME a|b COMMAND...   run a command on one of them
#   two_hosts.sh ssh NAME -tt ADDRESS LINE  the same as ssh would
#   two_hosts.sh link NAME down|up         cut the link, and mend it
#   two_hosts.sh pids NAME a|b             what runs there
#   two_hosts.sh down NAME                 end what runs there, and take all of it away
set -euo pipefail
net=${TWO_HOSTS_NET:-10.219.91}
verb=$1 name=$2
shift 2
run() { # HOST COMMAND...
    local host=$name-$1
    shift
    local words=(nsenter "--net=/run/netns/$host")
    if unshare --uts true 2>/dev/null; then
        # shellcheck disable=SC2016 # the inner shell is to expand them
        words+=(unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host")
    fi
    exec "${words[@]}" "$@"
}
down() {
    local host
    for host in "$name-a" "$name-b"; do
        [ -e "/run/netns/$host" ] || continue
        ip netns pids "$host" | xargs -r kill -KILL || true # some of them may just have ended
        ip netns del "$host"
    done
}
up() { # RATE
    local host number=0
    down
    trap down ERR
    for host in "$name-a" "$name-b"; do ip netns add "$host"; done
    ip link add "$name-a" netns "$name-a" type veth peer name "$name-b" netns "$name-b"
    for host in "$name-a" "$name-b"; do
        number=$((number + 1))
        ip -n "$host" address add "$net.$number/30" dev "$host"
        ip -n "$host" link set lo up
        ip -n "$host" link set "$host" up
        tc -n "$host" qdisc add dev "$host" root tbf rate "$1" burst 64kb latency 50ms
    done
}
case $verb in
up | run | down) "$verb" "$@" ;;
ssh)
    host=a
    [ "$2" = "$net.1" ] || host=b
    run "$host" sh -c "$3"
    ;;
link) ip -n "$name-a" link set "$name-a" "$1" ;;
pids) ip netns pids "$name-$1" ;;
*)
    sed -n '4,9s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
