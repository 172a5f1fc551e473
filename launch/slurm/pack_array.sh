#!/bin/bash
# Pack on N machines: a SLURM array of N parts, then a job that joins and checks them.
#
#   launch/slurm/pack_array.sh PARTS SOURCE OUT --shards S [options of `data_tools pack`]
#
# SOURCE and OUT lie on a file system that all nodes share. S is at least PARTS, better some shards for each
# part. Environment: SBATCH_OPTIONS (of sbatch: --cpus-per-task 32 --time 4:00:00 ...), LOGS_DIR (default: this
# directory), PYTHON. A part that failed or was killed is started again by the same command: what is finished
# is kept.
set -euo pipefail
if [ $# -lt 5 ] || [[ ! $1 =~ ^[1-9][0-9]*$ ]] || [[ " $* " != *" --shards"* ]]; then
    echo "usage: $0 PARTS SOURCE OUT --shards S [options of pack]" >&2
    exit 2
fi
parts=$1; shift
cd "$(dirname "$0")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
logs=${LOGS_DIR:-$PWD}
read -r -a options <<<"${SBATCH_OPTIONS:-}"
pack="$(printf '%q ' "$python" -m data_tools pack "$@")"

array=$(sbatch --parsable --job-name=pack --array="1-$parts" --output="$logs/pack-%A-%a.log" --requeue \
    --open-mode=append "${options[@]}" --wrap "$pack --workers \${SLURM_CPUS_PER_TASK:-1} --part \$SLURM_ARRAY_TASK_ID/$parts" | cut -d';' -f1)
finish=$(sbatch --parsable --job-name=pack-finish --output="$logs/pack-finish-%j.log" --requeue \
    --dependency="afterok:$array" --kill-on-invalid-dep=yes --wrap "$pack --finish" | cut -d';' -f1)
echo "pack=$array finish=$finish"
echo "squeue --me shows them; logs: $logs/pack-*.log"
