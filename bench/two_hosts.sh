#!/bin/sh
# Two network namespaces as two hosts, joined by a link of 1 Gbit/s and 1 ms each way, and a command of mpirun over it:
#
#     bench/two_hosts.sh COUNT COMMAND...        for example  2 python -m bench.parallel_worker SPEC
#
# Needs root, ip and tc, and an MPICH. RATE and DELAY set another link; it is cut once the file CUT exists.
set -e
count=$1
shift
a=gpurnn-a b=gpurnn-b
end() {
    for one in $a $b; do
        ip netns pids $one 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del $one 2>/dev/null || true
    done
    rm -rf "$folder"
}
folder=$(mktemp -d)
trap end EXIT
for one in $a $b; do
    ip netns add $one
    ip -n $one link set lo up
done
ip link add link0 netns $a type veth peer name link0 netns $b
ip -n $a addr add 10.77.0.1/24 dev link0
ip -n $b addr add 10.77.0.2/24 dev link0
for one in $a $b; do
    ip -n $one link set link0 up
    tc="ip netns exec $one tc qdisc replace dev link0 root"
    $tc netem rate "${RATE:-1gbit}" delay "${DELAY:-1ms}" limit 10000 2>/dev/null || {
        echo "this kernel has no netem: the link has its rate, and no delay" >&2
        $tc tbf rate "${RATE:-1gbit}" burst 128kb latency 50ms
    }
done
until ip -n $a link show link0 | grep -q "state UP" && ip -n $b link show link0 | grep -q "state UP"; do sleep 0.1; done
# In place of ssh: "HOST COMMAND..." runs in the namespace of the host.
cat >"$folder/launch" <<'LAUNCH'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in 10.77.0.1) space=gpurnn-a ;; *) space=gpurnn-b ;; esac
shift
exec ip netns exec $space sh -c "$*"
LAUNCH
chmod +x "$folder/launch"
if [ -n "$CUT" ]; then
    (
        until [ -e "$CUT" ]; do
            [ -d "$folder" ] || exit 0 # the command has ended before
            sleep 0.1
        done
        ip -n $a link set link0 down
    ) &
fi
# No shared memory, which knows nothing of namespaces; the rest is for both libraries that an MPICH may be built on.
export MPIR_CVAR_NOLOCAL=1 FI_PROVIDER=tcp FI_TCP_IFACE=link0 UCX_TLS=tcp,self UCX_NET_DEVICES=link0
ip netns exec $a mpirun -launcher ssh -launcher-exec "$folder/launch" -localhost 10.77.0.1 -disable-hostname-propagation \
    -hosts 10.77.0.1,10.77.0.2 -ppn 1 -n "$count" "$@"
