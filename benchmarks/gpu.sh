#!/bin/sh
# All that is run on a machine with an NVIDIA GPU, one part a call or several after one another:
#
#     sh benchmarks/gpu.sh smoke      # first: does each library say what NumPy says?
#     sh benchmarks/gpu.sh tests      # pytest -m gpu
#     sh benchmarks/gpu.sh compare    # gpt-xp compare
#     sh benchmarks/gpu.sh 124M       # bandwidth, products, CUDA graph and prepared kernels, beside transformers
#     sh benchmarks/gpu.sh 1558M
#     sh benchmarks/gpu.sh            # all of them, in this order
#
# The first call makes a virtual environment, .venv-gpu, with CuPy, JAX and PyTorch for the driver's CUDA (several GB);
# PYTHON names an interpreter that has what is to be measured, in place of that. A part is ended after 8 minutes (LIMIT, in
# seconds). What it prints is appended, as it comes, to gpu-DEVICE.md in benchmarks/results, or in the folder OUT. A part
# that fails is reported, and does not stop the next; the exit code is then 1.
#
# It has not been run on a GPU yet: there was none where it was written.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-.venv-gpu/bin/python}
limit=${LIMIT:-480}
parts="smoke tests compare 124M 1558M"

run() { # SECONDS (0: those of the part) COMMAND...: say so where it fails, and go on
    seconds=$1
    shift
    timeout --foreground "$seconds" "$@" # in the group of the part, which may end first
    code=$?
    [ "$code" -eq 0 ] && return
    [ "$code" -eq 124 ] && printf '\nENDED after %s seconds: %s\n' "$seconds" "$*"
    [ "$code" -eq 124 ] || printf '\nFAILED with exit code %s: %s\n' "$code" "$*"
    failed=1
}

text() { # the same, as text in Markdown
    printf '```text\n'
    run "$@"
    printf '```\n\n'
}

sized() { # SIZE ROUNDS KERNELS DTYPES PEERS
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 1' TERM INT
    text 30 "$python" benchmarks/bandwidth.py --size "$1"
    text 50 "$python" benchmarks/gpu_products.py --size "$1"
    run 180 "$python" benchmarks/cuda_graph.py --size "$1" --folder "$folder" --rounds "$2" --kernels "$3" --markdown
    printf '\n'
    run 210 "$python" benchmarks/peers.py --size "$1" --folder "$folder" --rounds "$2" --markdown --without-naive \
        --without-floor --contexts 16,512 --backends cupy,jax@gpu,torch@cuda --dtypes "$4" --peers "$5"
}

part() {
    failed=0
    case $1 in
    smoke) text 0 "$python" benchmarks/gpu_smoke.py ;;
    tests) text 0 "$python" -m pytest -m gpu -n 4 -q --tb=short --durations=10 ;;
    compare)
        run 0 "$python" -m gpt_xp compare -m shakespeare --backends numpy,cupy,jax@gpu,torch@cuda \
            --dtypes float32,float16,bfloat16 -n 16 --markdown
        ;;
    124M)
        sized 124M 5 split,append,attention,greedy,all float32,float16 \
            'transformers cuda float32,transformers cuda bfloat16,torch.compile cuda float32'
        ;;
    1558M) sized 1558M 3 split,attention,all float32 'transformers cuda float32,transformers cuda bfloat16' ;;
    esac
    return "$failed"
}

if [ "${1-}" = --inside ]; then # a part in a process of its own, which can be ended as a whole
    part "$2"
    exit
fi

for name in "$@"; do
    case " $parts " in
    *" $name "*) ;;
    *) echo "gpu.sh: there is no part $name; there are: $parts" >&2 && exit 2 ;;
    esac
done

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$device" ] || { echo "gpu.sh: nvidia-smi finds no GPU here; without one there is nothing to run" >&2 && exit 1; }
if [ -z "${PYTHON-}" ] && ! [ -x .venv-gpu/bin/gpt-xp ]; then # which pip writes last
    cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
    [ "${cuda:-13}" -ge 13 ] && cuda=13 || cuda=12
    echo "installing CuPy, JAX and PyTorch for CUDA $cuda into .venv-gpu"
    python3 -m venv .venv-gpu || exit 1
    .venv-gpu/bin/pip install --quiet -e ".[dev,jax-cuda$cuda,cupy-cuda${cuda}x,torch]" 'transformers>=5' || exit 1
fi
out=${OUT:-benchmarks/results}
result="$out/gpu-$(printf '%s' "$device" | tr ' /' '--').md"
mkdir -p "$out" || exit 1
status=$(mktemp)
trap 'rm -f "$status"' EXIT
[ -s "$result" ] || printf '# On an %s\n' "$device" >> "$result"
for name in ${*:-$parts}; do
    {
        printf '\n## %s\n\n    sh benchmarks/gpu.sh %s    # %s\n\n' "$name" "$name" "$(date -u +%Y-%m-%dT%H:%MZ)"
        timeout "$limit" sh benchmarks/gpu.sh --inside "$name"
        code=$?
        [ "$code" -eq 124 ] && printf '\nENDED after %s seconds: %s\n```\n' "$limit" "$name"
        [ "$code" -eq 0 ] || echo "$name" >> "$status"
    } 2>&1 | tee -a "$result"
done
echo "$result"
[ -s "$status" ] || exit 0
echo "FAILED: $(tr '\n' ' ' < "$status")"
exit 1
