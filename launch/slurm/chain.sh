#!/bin/bash
# Pack -> train -> evaluate -> export as four SLURM jobs, each started when the one before it has succeeded.
#
#   launch/slurm/chain.sh SOURCE SHARDS RECIPE [key=value ...]
#
# SHARDS is what `pack` makes of SOURCE and what is trained on. Environment: PACK_OPTIONS (of
# `data_tools pack`), TRAIN_OPTIONS (of sbatch: --nodes 4 --gres gpu:8 ...), EVAL_SETS (names of .bin
# files in SHARDS, default lfw.bin), LOGS_DIR (default: this directory), and those of train.sbatch.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 SOURCE SHARDS RECIPE [key=value ...]" >&2
    exit 2
fi
source_dir=$1; shards=$2; recipe=$3; shift 3
cd "$(dirname "$0")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
logs=${LOGS_DIR:-$PWD}
output=runs/$(basename "$recipe" .py)
for argument in "$@"; do
    case $argument in output=*) output=${argument#output=} ;; esac
done
sets=()
for name in ${EVAL_SETS:-lfw.bin}; do sets+=("$shards/$name"); done

# One command as a job; arguments are quoted once, for the shell that runs it.
job() {  # name, options of sbatch..., --, command...
    local name=$1 options=(); shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
    sbatch --parsable --job-name="$name" --output="$logs/$name-%j.log" --requeue "${options[@]}" \
        --wrap "$(printf '%q ' "$@")" | cut -d';' -f1
}
read -r -a pack_options <<<"${PACK_OPTIONS:-}"
read -r -a train_options <<<"${TRAIN_OPTIONS:-}"
pack=$(job pack -- "$python" -m data_tools pack "$source_dir" "$shards" "${pack_options[@]}")
train=$(LOGS="$logs/train-$pack" sbatch --parsable --dependency="afterok:$pack" --kill-on-invalid-dep=yes \
    --output="$logs/train-%j.log" "${train_options[@]}" launch/slurm/train.sbatch "$recipe" "rec=$shards" "$@" | cut -d';' -f1)
eval=$(job eval --dependency="afterok:$train" --kill-on-invalid-dep=yes -- "$python" -m eval lfw "$output" "${sets[@]}" --report "$output/report.html")
export=$(job export --dependency="afterok:$train" --kill-on-invalid-dep=yes -- "$python" launch/export.py "$output" "$output/model.onnx")
echo "pack=$pack train=$train eval=$eval export=$export"
echo "squeue --me shows them; logs: $logs/{pack,train,eval,export}-*.log"
