#!/usr/bin/env bash
# Everything that wants a GPU, in under 8 minutes: the tests, then what a step costs. Results go to the folder $1.
#
#     benchmarks/gpu.sh results            PYTHON=python3 has the packages of the "test" extra
#
# The times are for one GPU of the H100's class; TESTS and SECONDS_EACH are the limits of the tests and of each model.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"

# What a device can break first, without the files that start programs of their own.
timeout "${TESTS:-150}" "$python" -m pytest --device cuda --maxfail 20 --durations 10 -rs tests/test_loss.py tests/test_guided.py \
    tests/test_mixed_precision.py tests/test_frozen.py tests/test_double_backward.py tests/test_no_trace.py \
    tests/test_models.py tests/test_saliency.py tests/test_metrics.py tests/test_reports.py 2>&1 | tee "$out/tests.log" | tail -n 40

overhead() {
    "$python" benchmarks/overhead.py --device cuda --amp fp32 bf16 fp16 --layout contiguous channels_last \
        --repeat 30 --seconds "${SECONDS_EACH:-4}" --json "$out/overhead-cuda.json" "$@" 2>>"$out/overhead.err" | tee -a "$out/overhead.log"
}
overhead --models resnet18_cifar --size 32 --batch 128
overhead --models resnet18_cifar --size 32 --batch 512
overhead --models resnet50 mobilenet_v2 convnext_tiny vit_small_patch16_224 --size 224 --batch 128
tail -n 5 "$out/overhead.err"
