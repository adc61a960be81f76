# ---- the job: nothing below needs to be changed for a site -----------------------------------
set -uo pipefail
exec </dev/null
say() { printf '%s tessera: %s\n' "$(date +%FT%T)" "$*" >&2; }
die() {
    say "error: $1"
    exit "${2:-1}"
}
[ -n "${SLURM_JOB_ID:-}" ] || die "this is a job's script: submit it, by sbatch $0" 2
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || ARGUMENTS+=(--seed "$SLURM_ARRAY_TASK_ID")
nodes=$SLURM_JOB_NUM_NODES
head=${SLURMD_NODENAME:?}
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
gpus=${SLURM_GPUS_ON_NODE:-0}
# Of the job's own: two jobs on one node share no directory, no port and no token.
job=$STATE/job-$SLURM_JOB_ID
ray_dir=/tmp/tessera-$SLURM_JOB_ID
port=$((20000 + SLURM_JOB_ID % 3000 * 3))
export job ray_dir port cpus gpus INTERFACE OBJECT_STORE_BYTES
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$job/token RAY_USAGE_STATS_ENABLED=0
export PYTHONUNBUFFERED=1 # output appears at once, without srun's pseudo terminal
unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_TMPDIR

# Processes of the job, each a step of Slurm: on NODES COMMAND..., in a subshell or with &, which
# becomes srun, so that signals reach it. `setup` has run before.
on() {
    local list=$1 count
    shift
    count=$(scontrol show hostnames "$list" | wc -l)
    exec srun --export=ALL --overlap --nodelist="$list" --nodes="$count" --ntasks="$count" \
        --ntasks-per-node=1 --cpus-per-task="$cpus" --mem=0 --kill-on-bad-exit=0 "${STEP[@]}" \
        bash -c 'inside "$@"' job "$@"
}
inside() { # in the step; a signal for the command must not end a shell around it
    setup || { echo "error: setup failed on $(hostname)" >&2; exit 1; }
    if [ "$(type -t "$1")" = function ]; then "$@"; else exec "$@"; fi
}
start_ray() { # on every node: head, or worker ADDRESS; in the foreground, until it is stopped
    local status stopped='' options=(--block --temp-dir="$ray_dir" --num-cpus="$cpus" --num-gpus="$gpus"
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)
    if [ ! -r "$RAY_AUTH_TOKEN_PATH" ]; then
        echo "error: $(hostname) does not see $RAY_AUTH_TOKEN_PATH: set STATE in the job's" \
            "script to a directory that all nodes share" >&2
        return 1
    fi
    if [ -n "$INTERFACE" ]; then
        local address
        address=$(ip -4 -o address show dev "$INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}')
        [ -n "$address" ] || { echo "error: $(hostname) has no address on $INTERFACE" >&2; return 1; }
        options+=(--node-ip-address="$address")
    fi
    [ -z "$OBJECT_STORE_BYTES" ] || options+=(--object-store-memory="$OBJECT_STORE_BYTES")
    rm -rf -- "$ray_dir" && mkdir -m 700 "$ray_dir" || return 1
    if [ "$1" = head ]; then
        (
            until [ -s "$ray_dir/ray_current_cluster" ]; do sleep 0.2; done
            cp "$ray_dir/ray_current_cluster" "$job/address.part"
            mv "$job/address.part" "$job/address"
        ) &
        options+=(--head --port="$port" --ray-client-server-port=$((port + 1))
            --dashboard-port=$((port + 2)))
    else
        options+=(--address="$2")
    fi
    echo "$SLURM_STEP_ID" >"$job/step-$1"
    trap 'stopped=1' URG TERM # a TERM reaches Ray, too, and some of it does not end in order
    ray start "${options[@]}" >"$ray_dir/start.out" 2>&1 &
    while :; do
        [ -z "$stopped" ] || kill -s TERM $! 2>/dev/null
        wait $!
        status=$?
        kill -0 $! 2>/dev/null || break
    done
    if [ "$status" = 1 ] && [ -z "$stopped" ]; then
        cat "$ray_dir/start.out" >&2
        echo "error: Ray ended on $(hostname); its logs: $ray_dir/session_latest/logs" >&2
    else # the last of its processes may still write
        for _ in {1..10}; do
            rm -rf -- "$ray_dir" 2>/dev/null && break
            sleep 0.5
        done
    fi
    return "$status"
}
export -f setup inside start_ray

# A signal asks the run to stop with a checkpoint: USR1, which Slurm sends before the time limit,
# and is requeued; another one, for good. srun passes on USR1; at a TERM it would end the step.
asked='' waited=''
ask() {
    asked=$1
    say "SIG$1: stopping at the next safe point, with a checkpoint"
    if [ -n "$waited" ]; then kill -s USR1 "$waited" 2>/dev/null; fi
}
for signal in USR1 USR2 TERM; do
    # shellcheck disable=SC2064  # expanded now
    trap "ask $signal" "$signal"
done
await() { # a background process; its exit status. Signals are handled meanwhile.
    local status
    waited=$1
    while :; do
        wait "$1"
        status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    waited=''
    return "$status"
}
requeue() {
    say "requeued; it goes on from its newest checkpoint"
    tidy
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends it
    exit 1
}
stopped_early() { # asked to stop before the run began
    [ "$asked" != USR1 ] || requeue
    [ -z "$asked" ] || { say "stopped before the run began"; exit 130; }
}

# What was started is stopped by its own steps; `ray stop` would end other jobs' Ray, too. URG
# changes nothing else: at a TERM, to srun or to the step, Slurm kills the step after KillWait.
steps=()
tidy() {
    local step left=40
    trap '' USR1 USR2 TERM
    for step in "$job"/step-*; do
        [ ! -e "$step" ] || scancel --signal=URG "$SLURM_JOB_ID.$(<"$step")" 2>/dev/null
    done
    while [ "$left" -gt 0 ] && [ -n "$(jobs -pr)" ]; do
        sleep 0.5
        left=$((left - 1))
    done
    for step in "${steps[@]}"; do kill -s TERM "$step" 2>/dev/null; done
    rm -rf -- "$job"
    [ "$nodes" != 1 ] || rm -rf -- "$ray_dir"
    trap - EXIT
}
trap tidy EXIT

rm -rf -- "$job"
(umask 077 && mkdir -p "$job") || die "STATE=$STATE cannot be written"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$job/token")
{ # for commands beside the job
    declare -f setup inside
    declare -p head STEP cpus RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH
} >"$job/environment"

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $RUN_DIR"
if [ "$nodes" = 1 ]; then # a Ray of the run's own, on loopback
    where=(--ray.num-cpus "$cpus" --ray.temp-dir "$ray_dir")
else
    on "$head" start_ray head &
    steps+=($!)
    for ((tries = JOIN_S * 2; tries > 0; tries--)); do
        [ ! -s "$job/address" ] || break
        kill -0 "${steps[0]}" 2>/dev/null || die "Ray's head did not start; its output is above"
        stopped_early
        sleep 0.5
    done
    [ -s "$job/address" ] || die "Ray's head did not start within $JOIN_S s"
    address=$(<"$job/address")
    others=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$head" | paste -sd,)
    on "$others" start_ray worker "$address" &
    steps+=($!)
    on "$head" python -m cluster.deploy.nodes --address "$address" --wait "$nodes" --within "$JOIN_S" &
    await $! || { stopped_early; die "not all nodes joined; their output is above"; }
    say "dashboard: 127.0.0.1:$((port + 2)) of $head"
    where=(--ray.address "$address")
fi
stopped_early

on "$head" python -m learner.run "${ARGUMENTS[@]}" "${where[@]}" &
await $!
status=$?
say "the run ended with exit status $status"
case $asked-$status in # 138: it was still starting
    USR1-130 | USR1-138) requeue ;;
esac
exit "$status"
