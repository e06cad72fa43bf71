#!/usr/bin/env bash
# One training on several nodes of a Slurm cluster. Checked by `bash -n` and shellcheck; never run
# under Slurm by this project.
#
#   sbatch docs/deploy/slurm.sh mnist strategy.num_workers=2 tracking.uri=http://MLFLOW:5000
#
# The project with its .venv, and runs_dir, lie in a folder that all nodes see. The job asks for its
# own continuation: when its time is over, or Slurm takes it away, the run saves, and the job is
# queued again; `resume=auto` goes on.

#SBATCH --job-name=orchestrator
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
# Two minutes before the end the batch shell gets SIGTERM, which it passes on: the run saves.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
job=$1
shift
cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}"
port=6379
ray=$PWD/.venv/bin/ray

# A token for this job alone, which no other user of the nodes can read.
umask 077
token=$(mktemp "$PWD/.ray-token-$SLURM_JOB_ID-XXXXXX")
trap 'rm -f "$token"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500
export RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3

address_of() { srun --nodes=1 --ntasks=1 --overlap -w "$1" hostname --ip-address | awk '{print $1}'; }
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(address_of "${nodes[0]}")

start_ray() { # NODE ARGUMENTS...: with --block, so that Ray ends with the step
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --overlap -w "$node" "$ray" start --block --disable-usage-stats \
        --num-cpus="$SLURM_CPUS_PER_TASK" "$@" &
}

start_ray "${nodes[0]}" --head --port="$port" --node-ip-address="$head" --include-dashboard=false
until (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do sleep 1; done
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$head:$port" --node-ip-address="$(address_of "$node")"
done

# The batch script runs on the first node, where Ray's head is. Nodes that are still joining are
# waited for, by cluster.queue_s.
.venv/bin/python -m orchestrator train "job=$job" resume=auto cluster=existing \
    "cluster.address=$head:$port" cluster.code=installed cluster.queue_s=300 \
    cluster.cpus_per_worker="$SLURM_CPUS_PER_TASK" cluster.placement=STRICT_SPREAD \
    cluster.trusted_network=true strategy=multi_worker "$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
if kill -0 "$driver" 2>/dev/null; then # a signal has ended the wait, not the driver
    code=0
    wait "$driver" || code=$?
fi
echo "the driver ended with $code"
case $code in
    6 | 7 | 75 | 137 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
    # A network file system may still keep the lock of a host that has died: some tries.
    5) [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
