#!/usr/bin/env bash
# Everything that wants a GPU, in one command, in minutes:  launch/bench/gpu.sh [OUT]
# Tests marked gpu, the head beside the standard form and the floor of its GEMMs (OUT/head.json, one
# line a case), what each loss's head costs beside CosFace's (OUT/losses.json), the loaders' rates
# (OUT/loader.json), then training steps of r50 on generated faces with both loaders, whose
# metrics.jsonl (images_per_second, data_wait) lands in OUT.
# PYTHON names the interpreter (default: python3), which needs the packages of requirements.txt.
# REHEARSAL=1 runs the same commands on a CPU at a size of no meaning.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-runs/gpu}
mkdir -p "$out"
processes=$("$python" -c 'import torch; print(torch.cuda.device_count())')
head=(--suite gpu)
losses=(--batch $((128 * processes)))
faces=(--identities 500 --images 20)
training=(batch_size=128 max_steps=100 log_every=20 num_workers=8)
loader=(--threads 8)
if [ -n "${REHEARSAL:-}" ]; then
    processes=1
    head=(--classes 500 --batch 8 --embedding-size 32 --dtype bf16 --pairs 1 --warmup 1)
    losses=(--classes 500 --batch 8 --embedding-size 32 --pairs 1 --warmup 1 --losses arcface)
    faces=(--identities 12 --images 4)
    training=(network=mbf_tiny batch_size=8 max_steps=2 log_every=1 num_workers=1)
    loader=(--threads 1 --rounds 1 --batches 1)
fi
[ "$processes" -gt 0 ] || { echo "no CUDA device here"; exit 1; }
torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes")
"$python" -m pytest -m gpu -rs tests
"$python" launch/bench/head.py "${head[@]}" >"$out/head.json"
"${torchrun[@]}" launch/bench/losses.py "${losses[@]}" >"$out/losses.json"
"$python" -m data_tools synthesize "$out/faces" "${faces[@]}"
"$python" -m data_tools pack "$out/faces" "$out/shards" --shards 8 --workers 8
"$python" launch/bench/loader.py "$out/shards" "${loader[@]}" >"$out/loader.json"
for run in bf16/cpu fp32/cpu bf16/dali; do
    precision=${run%/*} name=${run#*/}
    "${torchrun[@]}" launch/train.py launch/configs/ms1mv2_r50_arcface.py rec="$out/shards" \
        val_targets= "${training[@]}" precision="$precision" loader="$name" \
        output="$out/r50_${precision}_$name"
done
