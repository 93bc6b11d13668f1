#!/usr/bin/env bash
# Everything that wants a GPU, in under 8 minutes: the tests, then what a step costs. Results go to the folder $1.
#
#     benchmarks/gpu.sh results            PYTHON=python3 has the packages of the "test" extra
#
# On one GPU of the H100's class and 12 processor cores. SECONDS_IN_ALL, TESTS and SECONDS_EACH limit the whole, the tests and
# each contender. What the folder holds already is not measured again: what did not fit comes with the next call.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for the results}
python=${PYTHON:-python3}
end=$((SECONDS + ${SECONDS_IN_ALL:-470}))
mkdir -p "$out"

# All that can run on a device, without the files that start programs of their own and the random networks, which take
# minutes there: `make test-cuda` has them.
tests=(captum check cuda double_backward errors frozen guided integrations interrupts loss messages metrics mixed_precision
    models no_trace plot private reports saliency targets)
OMP_NUM_THREADS=1 timeout "${TESTS:-200}" "$python" -m pytest --device cuda -n "${WORKERS:-11}" --dist worksteal -p no:benchmark --maxfail 20 \
    --durations 10 -rs $(printf 'tests/test_%s.py ' "${tests[@]}") 2>&1 | tee "$out/tests.log" | tail -n 40

# ResNet-18 on small images and ResNet-50, what most people train; then what else there is; last what is slow to measure.
overhead() {
    local left=$((end - SECONDS))
    [ $left -gt 0 ] && timeout $left "$python" benchmarks/overhead.py --device cuda --each-step --missing --repeat 30 \
        --seconds "${SECONDS_EACH:-4}" --json "$out/overhead-cuda.json" "$@" 2>>"$out/overhead.err" | tee -a "$out/overhead.log"
}
layouts="--layout channels_last contiguous"
overhead --models resnet18_cifar --size 32 --batch 128 512 --amp bf16 fp32 fp16 $layouts
overhead --models resnet50 --size 224 --batch 128 --amp bf16 fp16 fp32 $layouts
overhead --models mobilenet_v2 vit_small_patch16_224 convnext_tiny --size 224 --batch 128 --amp bf16 --layout channels_last
overhead --models vit_small_patch16_224 mobilenet_v2 convnext_tiny --size 224 --batch 128 --amp fp16 fp32 --layout channels_last
overhead --models vit_small_patch16_224 mobilenet_v2 convnext_tiny --size 224 --batch 128 --amp bf16 fp16 fp32 --layout contiguous
left=$((end - SECONDS))
[ $left -gt 0 ] && timeout $left "$python" benchmarks/kernels.py --json "$out/kernels-cuda.json" 2>>"$out/overhead.err" |
    tee "$out/kernels.log"
tail -n 5 "$out/overhead.err"
