#!/usr/bin/env bash
# Everything that wants a GPU, in under 8 minutes: the tests, then what a step costs. Results go to the folder $1.
#
#     benchmarks/gpu.sh results            PYTHON=python3 has the packages of the "test" extra
#
# The times are for one GPU of the H100's class and 12 processor cores; TESTS and SECONDS_EACH are the limits of the tests
# and of each model. Results in that folder are added to.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"

# What a device can break first, without the files that start programs of their own.
tests=(cuda loss guided mixed_precision frozen double_backward no_trace models saliency metrics reports)
timeout "${TESTS:-150}" "$python" -m pytest --device cuda -n "${WORKERS:-11}" -p no:benchmark --maxfail 20 --durations 10 -rs \
    $(printf 'tests/test_%s.py ' "${tests[@]}") 2>&1 | tee "$out/tests.log" | tail -n 40

# ResNet-18 on small images, ResNet-50: what most people train; then what else there is, each step alone.
overhead() {
    "$python" benchmarks/overhead.py --device cuda --layout channels_last --each-step \
        --repeat 30 --seconds "${SECONDS_EACH:-4}" --json "$out/overhead-cuda.json" "$@" 2>>"$out/overhead.err" | tee -a "$out/overhead.log"
}
overhead --models resnet18_cifar --size 32 --batch 128 512 --amp bf16 fp32 fp16
overhead --models resnet50 --size 224 --batch 128 --amp bf16 fp32
overhead --models mobilenet_v2 convnext_tiny vit_small_patch16_224 --size 224 --batch 128 --amp bf16
overhead --models resnet50 mobilenet_v2 --size 224 --batch 128 --amp fp16
"$python" benchmarks/kernels.py --json "$out/kernels-cuda.json" 2>>"$out/overhead.err" | tee "$out/kernels.log"
tail -n 5 "$out/overhead.err"
