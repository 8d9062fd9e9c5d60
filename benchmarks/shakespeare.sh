#!/bin/sh
# How the bundled model, gpt_xp/models/shakespeare, was trained, and how its figures were taken.
#
#     pip install 'gpt-xp[train]'
#     sh benchmarks/shakespeare.sh tinyshakespeare.txt shakespeare
#
# The text is data/tinyshakespeare/input.txt of the repository karpathy/char-rnn (public domain), 1,115,394 bytes. The
# same machine gives the same model, bit for bit; another one differs in rounding, and ends close by. When it was stopped,
# `gpt-xp train --out shakespeare --resume` goes on.
set -eu
data=$1 out=$2
python3 - "$data" <<'EOF'
import hashlib, sys
if hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed":
    sys.exit(f"{sys.argv[1]} is not the text that the bundled model was trained on")
EOF

gpt-xp train --data "$data" --out "$out" \
  --n-layer 6 --n-head 6 --n-embd 192 --n-ctx 256 --vocab-size 1024 \
  --steps 3200 --batch-size 16 --accumulate 1 --learning-rate 0.002 --min-learning-rate 0.05 --weight-decay 1 \
  --weight-dropout 0.1 --average 0.998 --eval-every 200 --patience 0 --save-dtype float16 --seed 1

for convention in "huggingface --stride 128" "lm-eval" "nanogpt --crops 5000"; do
  echo "--convention $convention"
  # shellcheck disable=SC2086  # an option and its value
  gpt-xp score --model "$out" --last 0.1 --convention $convention "$data"
done
