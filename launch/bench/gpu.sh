#!/usr/bin/env bash
# Everything that wants a GPU, in one command, in less than ten minutes:  launch/bench/gpu.sh [OUT]
# In the order of what is missed most if time is short:
#   OUT/head.json     the head in each of its forms (plain, torch.compile, Triton) beside the standard
#                     form and the floor of its GEMMs, in turns: bf16, C 1 M, B 1024 and 4096, r 1.0
#                     and 0.1; one line a case
#   OUT/largest.json  30 M classes x 512 at r 0.1 on one device, rows on it or, by head_storage=host,
#                     beside it, whichever fits
#   OUT/r50.json      images/s of training steps of r50 on generated faces, with both loaders
#   OUT/loader.json   the loaders' rates
#   OUT/losses.json   what each loss's head costs beside CosFace's
#   OUT/tests.txt     the tests marked gpu
# A part that fails or outlasts its time is said and left out, the others go on; the exit code then
# is 1. OUT/stages.json has the seconds of each.
# PYTHON names the interpreter (default: python3), which needs the packages of requirements.txt.
# REHEARSAL=1 runs the same commands on a CPU at a size of no meaning, Triton in its interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-runs/gpu}
mkdir -p "$out" || exit 1
processes=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 1
head=(--suite gpu --processes 1)
largest=(--classes 30000000 --batch 1024 --sample-rate 0.1 --dtype bf16 --alone --storage auto
    --processes 1 --pairs 3 --warmup 1)
losses=(--batch $((128 * processes)) --seconds 15)
faces=(--identities 500 --images 20)
training=(batch_size=128 max_steps=60 log_every=20 num_workers=8)
loader=(--threads 8)
patience=1
if [ -n "${REHEARSAL:-}" ]; then
    processes=1 patience=9
    head=(--classes 500 --batch 8 --embedding-size 32 --dtype bf16 --pairs 1 --warmup 0
        --processes 1 --forms compiled triton)
    largest=(--classes 500 --batch 8 --embedding-size 32 --sample-rate 0.1 --dtype bf16 --alone
        --storage auto --processes 1 --pairs 1 --warmup 0)
    losses=(--classes 500 --batch 8 --embedding-size 32 --pairs 1 --warmup 1 --losses arcface)
    faces=(--identities 12 --images 4)
    training=(network=mbf_tiny batch_size=8 max_steps=2 log_every=1 num_workers=1)
    loader=(--threads 1 --rounds 1 --batches 1)
    export TRITON_INTERPRET=1
fi
[ "$processes" -gt 0 ] || { echo "no CUDA device here"; exit 1; }
torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes")

failed=()
stages=
stage() { # NAME SECONDS FILE COMMAND...: its output in OUT/FILE
    local name=$1 seconds=$(($2 * patience)) file=$3 began=$SECONDS code=0
    shift 3
    timeout --kill-after 10 "$seconds" "$@" >"$out/$file" || code=$?
    [ "$code" = 0 ] || { failed+=("$name"); echo "$name: exit $code (124: out of time)" >&2; }
    stages="$stages${stages:+, }\"$name\": {\"seconds\": $((SECONDS - began)), \"exit\": $code}"
    echo "{$stages}" >"$out/stages.json"
}

stage head 170 head.json "$python" launch/bench/head.py "${head[@]}"
stage largest 180 largest.json "$python" launch/bench/head.py "${largest[@]}"
stage faces 25 faces.txt "$python" -m data_tools synthesize "$out/faces" "${faces[@]}"
stage pack 15 pack.txt "$python" -m data_tools pack "$out/faces" "$out/shards" --shards 8 \
    --workers 8
for run in bf16/cpu bf16/dali fp32/cpu; do
    precision=${run%/*} name=${run#*/}
    stage "r50_${precision}_$name" 25 "r50_${precision}_$name.txt" "${torchrun[@]}" \
        launch/train.py launch/configs/ms1mv2_r50_arcface.py rec="$out/shards" val_targets= \
        "${training[@]}" precision="$precision" loader="$name" output="$out/r50_${precision}_$name"
done
stage r50 10 r50.json "$python" - "$out"/r50_*/ <<'EOF'
import json, pathlib, statistics, sys  # medians of the log steps but the first, which compiles

rates = {}
for run in map(pathlib.Path, sys.argv[1:]):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = [record for record in records if "images_per_second" in record]
    rates[run.name] = {
        key: statistics.median(record[key] for record in logged[1:] or logged)
        for key in ("images_per_second", "data_wait")
        if key in logged[0]
    }
print(json.dumps(rates))
EOF
stage loader 25 loader.json "$python" launch/bench/loader.py "$out/shards" "${loader[@]}"
stage losses 30 losses.json "${torchrun[@]}" launch/bench/losses.py "${losses[@]}"
stage tests 60 tests.txt "$python" -m pytest -m gpu -rs tests
[ ${#failed[@]} = 0 ] || { echo "left out: ${failed[*]}" >&2; exit 1; }
