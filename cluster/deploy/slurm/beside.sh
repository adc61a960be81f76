#!/usr/bin/env bash
# Run a command beside a running job, on its first node and with its token:
#     ./beside JOB python -m cluster.status --run /shared/runs/first
# JOB: as squeue shows it; of an array, 1234_0.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
id=$(squeue --noheader --format=%A --jobs="$1" | head -n 1)
[ -n "$id" ] || { echo "error: no job $1 is running" >&2; exit 1; }
shift
head='' cpus='' STEP=()
# shellcheck disable=SC1090  # written by the job
. "$STATE/job-$id/environment" || { echo "error: job $1 has left nothing in $STATE" >&2; exit 1; }
export -f setup inside
exec srun --jobid="$id" --export=ALL --overlap --nodelist="$head" --nodes=1 --ntasks=1 \
    --ntasks-per-node=1 --cpus-per-task="$cpus" --mem=0 "${STEP[@]}" \
    bash -c 'inside "$@"' beside "$@"
