#!/usr/bin/env bash
# Train on Slurm, on one node or many, with GPUs or without. Arguments go to train_dpo.py.
#
#   sbatch slurm/dpo.sh                                       one CPU node, the built-in example
#   sbatch --gpus-per-node=8 --cpus-per-gpu=8 --mem=0 slurm/dpo.sh --config ds_configs/zero2.json --recipe recipes/NAME.yaml
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --mem=0 --time=12:00:00 slurm/dpo.sh --config ...
#   sbatch --chdir=/path/to/dpo-suite /path/to/dpo-suite/slurm/dpo.sh --config ...     from another folder
#
# One process per GPU that the job got. On CPU nodes: one, or as many as --ntasks-per-node says.
# DPO_PROCESSES_PER_NODE=N overrides both. The site's own set-up (modules, container, NCCL) goes
# into slurm/env.sh: see env.example.sh. Output: dpo-JOBID.out where the job was submitted from; that of
# nodes after the first: dpo-JOBID-NODE.log in the repository.
#
# 120 s before its time is up Slurm sends USR1: training finishes its step, writes a checkpoint and ends, and
# the job is put back into the queue, where it goes on from there. `scancel --batch --signal=USR1 JOBID` does
# the same at once. Where a checkpoint takes longer, ask for more: sbatch --signal=B:USR1@900. A plain scancel leaves a
# checkpoint too, if that takes less than the cluster's KillWait (30 s by default), and does not put the job back.
#
#SBATCH --job-name=dpo
#SBATCH --output=dpo-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

die() { echo "slurm/dpo.sh: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script: sbatch slurm/dpo.sh [arguments of train_dpo.py]"

# --- where the repository is: Slurm runs a copy of this script from its spool directory ---------
repository=
for folder in "$PWD" "$SLURM_SUBMIT_DIR"; do
    if [ -f "$folder/train_dpo.py" ]; then repository=$folder; break; fi
done
[ -n "$repository" ] ||
    die "no train_dpo.py in $PWD: submit from the repository, or with sbatch --chdir=REPOSITORY"
cd "$repository" || die "cannot enter $repository"

# --- the environment --------------------------------------------------------------------------
launcher=()       # a command in front of torchrun, such as a container: slurm/env.sh may set it
srun_options=()   # further options of srun: likewise
# Before `set -u`: module systems and activate scripts read variables that are not set. In a function:
# a sourced script would see our arguments, and conda's activate takes them for its own.
# shellcheck source=/dev/null
set_up_site() { source slurm/env.sh; }
if [ -f slurm/env.sh ]; then set_up_site || die "slurm/env.sh failed"; fi
if [ -f .venv/bin/activate ] && [ ${#launcher[@]} = 0 ] &&
    [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
set -euo pipefail
[ ${#launcher[@]} != 0 ] || command -v torchrun >/dev/null ||
    die "torchrun not found: install into $repository/.venv, or activate an environment in slurm/env.sh"

# --- how many processes on a node ----------------------------------------------------------------
gpus_of_node() { # as Slurm knows them ("gpu:h100:8(S:0-1)"), else as the driver shows them
    local count
    count=$(sinfo --noheader --Node --nodes="$SLURMD_NODENAME" --format=%G 2>/dev/null |
        sed -nE 's/(^|.*,)gpu:([^:,(]+:)?([0-9]+).*/\3/p' | head -n 1) || true
    if [ -z "$count" ] && command -v nvidia-smi >/dev/null; then
        count=$(timeout 30 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true
    fi
    echo "${count:-0}"
}

# Left empty where the job has GPUs: every node then takes as many as it got, which may differ (--gpus=12).
processes=${DPO_PROCESSES_PER_NODE:-}
tasks_per_node=${SLURM_NTASKS_PER_NODE:-1}
if [ -z "$processes" ] && [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ]; then
    idle_gpus=$(gpus_of_node)
    [ "$idle_gpus" = 0 ] || die "$SLURMD_NODENAME has $idle_gpus GPUs and the job got none:" \
        "submit with --gpus-per-node=$idle_gpus (or, to train without them, DPO_PROCESSES_PER_NODE=1)"
    processes=$tasks_per_node
fi
export DPO_PROCESSES_PER_NODE=$processes
here=${processes:-$SLURM_GPUS_ON_NODE}

# --- run: one torchrun per node, meeting at the first ---------------------------------------------
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((15000 + SLURM_JOB_ID % 15000))   # jobs may share a node; below Linux's ephemeral ports
[ $# -gt 0 ] || set -- --config ds_configs/zero2.json
# A job that was put back goes on from its newest checkpoint: train.resume was for its first start.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --train.resume auto

# Since 22.05 srun does not take over --cpus-per-task; our one task per node stands for all of sbatch's.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    srun_options+=(--cpus-per-task="$((SLURM_CPUS_PER_TASK * tasks_per_node))")
fi
# torchrun would set 1: right for GPUs' helpers, a waste of a CPU node's cores.
threads=$((SLURM_CPUS_ON_NODE / here))
if [ -z "$processes" ] && [ "$threads" -lt 2 ]; then
    echo "slurm/dpo.sh: $SLURM_CPUS_ON_NODE CPUs for $here GPUs of this node make loading slow:" \
        "submit with --cpus-per-gpu=8 --mem=0" >&2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export SLURM_EXPORT_ENV=ALL   # `sbatch --export=NONE` would leave srun's tasks without PATH
# --gpus-per-task would leave our one task per node with one task's GPUs.
if [ -n "${SLURM_GPUS_PER_TASK:-}" ]; then srun_options+=(--gpus-per-node="$SLURM_GPUS_ON_NODE"); fi

echo "slurm/dpo.sh: job $SLURM_JOB_ID, nodes $SLURM_JOB_NUM_NODES, processes on this one $here," \
    "rendezvous $first_node:$port, repository $repository"
# How training ended: torchrun makes every failure a 1.
export DPO_STATUS_FILE=$repository/.dpo-status-$SLURM_JOB_ID.json
rm -f "$DPO_STATUS_FILE"
# torchrun gives ranks that it was told to end 30 s; how long they really have is for Slurm to say.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# bash runs a trap only between foreground commands: srun goes to the background. On TERM (scancel,
# time limit) Slurm signals the step as well, so all there is to do is to wait for its end.
interrupted=
preempted=
over=
# Of a job that is cancelled after USR1 nothing is over: it ends, and does not go back into the queue.
# shellcheck disable=SC2317  # called by the trap
is_time_up() { [ "$(date +%s)" -ge "$((${SLURM_JOB_END_TIME:-0} - 60))" ]; }
trap 'interrupted=1; if [ -n "$preempted" ] && is_time_up; then over=1; fi' TERM
trap 'interrupted=1; preempted=1; scancel --signal=USR1 "$SLURM_JOB_ID.0" || true' USR1
# Slurm's proctrack/cgroup signals the shell of a node alone, other plugins all that it has started: the shell hands USR1
# on to what runs train_dpo.py, which takes a second one at once for an echo, and TERM where torchrun has not got it.
hands_on_term=
config=$(scontrol show config 2>/dev/null) || true   # not into a pipe: its end would be that of what stops reading early
if grep -q 'ProctrackType *= *proctrack/cgroup' <<<"$config"; then hands_on_term=1; fi
export DPO_HANDS_ON_TERM=$hands_on_term
# torchrun would die of USR1 and leave its workers behind: it is blocked, they inherit that and lift it when they
# listen. PET_NPROC_PER_NODE and PET_NODE_RANK are torchrun's --nproc_per_node and --node_rank.
# shellcheck disable=SC2016  # expanded on each node
on_each_node='
    if [ "$SLURM_NODEID" != 0 ]; then exec >>"dpo-$SLURM_JOB_ID-$SLURMD_NODENAME.log" 2>&1; fi
    export PET_NPROC_PER_NODE=${DPO_PROCESSES_PER_NODE:-$SLURM_GPUS_ON_NODE} PET_NODE_RANK=$SLURM_NODEID
    if env --block-signal=USR1 true 2>/dev/null; then
        env --block-signal=USR1 "$@" &
    else
        (trap "" USR1; exec "$@") &
    fi
    torchrun=$!
    hand_on_usr1() {
        local child
        for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
            if grep -q train_dpo.py /proc/"$child"/cmdline 2>/dev/null; then kill -USR1 "$child" || true; fi
            hand_on_usr1 "$child"
        done
    }
    again=
    trap "again=1; hand_on_usr1 $torchrun" USR1
    trap "again=1; [ -z \"$DPO_HANDS_ON_TERM\" ] || kill -TERM $torchrun" TERM
    while :; do
        status=0
        wait "$torchrun" || status=$?
        [ -n "$again" ] || exit "$status"
        again=
    done'
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${srun_options[@]}" bash -c "$on_each_node" torchrun "${launcher[@]}" \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --master_addr="$first_node" --master_port="$port" train_dpo.py "$@" &
step=$!
while :; do
    status=0
    wait "$step" || status=$?
    [ -n "$interrupted" ] || break
    interrupted=
    if [ -n "$over" ]; then   # time is up, and after KillWait (30 s) nobody is left to put the job back
        for _ in {1..20}; do if kill -0 "$step" 2>/dev/null; then sleep 1 || true; fi; done
        kill -0 "$step" 2>/dev/null || { status=0; wait "$step" || status=$?; }
        break
    fi
done

state=$(sed -nE 's/.*"state": "([a-z]+)".*/\1/p' "$DPO_STATUS_FILE" 2>/dev/null) || true
reached=$(sed -nE 's/.*"step": ([0-9]+), "place": "([^"]*)".*/step \1, \2/p' "$DPO_STATUS_FILE" 2>/dev/null) || true
rm -f "$DPO_STATUS_FILE"
# How far training had come when the job was last put back.
last_file=.dpo-requeued-$SLURM_JOB_ID
last=$(cat "$last_file" 2>/dev/null) || true
if [ -n "$preempted" ] && [[ "$state" = preempted || ( -n "$over" && "$state" = running ) ]]; then
    if [ -n "$last" ] && [ "$last" = "$reached" ]; then
        rm -f "$last_file"
        die "twice in a row time was up at the same place ($reached): give the job more (--time), or notice it" \
            "earlier (--signal=B:USR1@900), or save more often (train.save_every)"
    fi
    echo "$reached" >"$last_file"
    if [ "$state" = preempted ]; then saved=checkpointed; else saved="not checkpointed in time"; fi
    echo "slurm/dpo.sh: $saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60   # Slurm ends this script
fi
rm -f "$last_file"
exit "$status"
