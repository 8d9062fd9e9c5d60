#!/bin/sh
# All that is measured on a CUDA GPU, in one command:
#
#     pip install -e '.[dev,jax-cuda13,cupy-cuda13x,torch]' -r benchmarks/requirements.txt   # or cuda12, as the driver is
#     sh benchmarks/gpu.sh
#
# It runs the GPU tests, and for 124M and 1558M gpt-xp on JAX, CuPy and PyTorch beside transformers, eager and through
# torch.compile, and the time that the weights' bytes take at the measured memory bandwidth; and CuPy's CUDA graph
# beside CuPy without one, after comparing their texts. The result is benchmarks/results/gpu-DEVICE.md. What is not
# installed is skipped, with its reason.
#
# It has not been run yet: there was no GPU where it was written.
set -eu
cd "$(dirname "$0")/.."
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
result="benchmarks/results/gpu-$(echo "$device" | tr ' /' '--').md"
temporary=$(mktemp)
trap 'rm -f "$temporary"' EXIT

{
    printf '# On an %s\n\n    sh benchmarks/gpu.sh\n\n' "$device"
    printf '    pytest -m gpu: %s\n' "$(python -m pytest -q -m gpu 2>&1 | tail -n 1)"
    for size in 124M 1558M; do
        printf '\n## %s\n\n' "$size"
        python benchmarks/bandwidth.py --size "$size"
        printf '\n'
        python benchmarks/peers.py --size "$size" --markdown --without-naive --without-floor \
            --contexts 16,512 --backends jax@gpu,cupy,torch@cuda --dtypes float32,bfloat16 \
            --peers 'transformers cuda float32,transformers cuda bfloat16,torch.compile cuda float32,torch.compile cuda bfloat16'
        printf '\n'
        python benchmarks/cuda_graph.py --size "$size" --markdown || printf '    benchmarks/cuda_graph.py failed\n'
    done
} > "$temporary"
mv "$temporary" "$result"
echo "$result"
