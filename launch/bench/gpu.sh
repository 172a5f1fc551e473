#!/usr/bin/env bash
# What only a GPU can answer, in two stages of five minutes each, the most valuable first:
#   launch/bench/gpu.sh 1            right numbers, the head's speed beside other libraries'
#   launch/bench/gpu.sh 2            training end to end, the largest head, DALI
#   launch/bench/gpu.sh              both
#   launch/bench/gpu.sh --rehearse   the same commands at small sizes on a CPU
# The results are one JSON file in $OUT (else runs/gpu). gpu.py beside this file has the parts and
# their limits. PYTHON names the interpreter (default: python3); it needs torch and its own needs,
# numpy, opencv, onnx, onnxruntime, tensorboard and safetensors, and nothing has to be installed of
# this repository.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m launch.bench.gpu.stages "$@"
