#!/usr/bin/env bash
# Everything that wants a GPU, in one command, in minutes:  launch/bench/gpu.sh [OUT]
# Tests marked gpu, what each loss's head costs beside CosFace's (OUT/losses.json), the loaders'
# rates (OUT/loader.json), then training steps of r50 on generated faces with both loaders, whose
# metrics.jsonl (images_per_second, data_wait) lands in OUT.
# PYTHON names the interpreter (default: python3), which needs the packages of requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-runs/gpu}
mkdir -p "$out"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "no CUDA device here"; exit 1; }
"$python" -m pytest -m gpu -rs tests
"$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
    launch/bench/losses.py --batch $((128 * gpus)) >"$out/losses.json"
"$python" -m data_tools synthesize "$out/faces" --identities 500 --images 20
"$python" -m data_tools pack "$out/faces" "$out/shards" --shards 8 --workers 8
"$python" launch/bench/loader.py "$out/shards" --threads 8 >"$out/loader.json"
for run in bf16/cpu fp32/cpu bf16/dali; do
    precision=${run%/*} loader=${run#*/}
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
        launch/train.py launch/configs/ms1mv2_r50_arcface.py rec="$out/shards" val_targets= \
        batch_size=128 max_steps=100 log_every=20 num_workers=8 precision=$precision \
        loader=$loader output="$out/r50_${precision}_$loader"
done
