#!/usr/bin/env bash
# torchrl 0.14.1: the correction of BatchRenorm1d, clipped to max_r and max_d, is then multiplied by the number of
# warm-ups that have gone by (num_batches_tracked // warmup_steps): the count that is to stop there goes on, since
# clamp_max gives a new tensor.
#
# Guess before, from its source: at twice warmup_steps r - 1 and d are doubled, and so on: outputs grow step by step, and
# training and evaluation part.
# Seen: with running statistics held (momentum 0) and one batch again and again, training is evaluation after one
# warm-up (0 apart), 1.5 apart after two, 3 after three and 13.5 after ten.
#
#   findings/torchrl_renorm.sh [PYTHON]              3.11
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchrl==0.14.1 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import torch
import torchrl
from torchrl.modules import BatchRenorm1d

torch.manual_seed(0)
x = 1.5 + torch.randn(64, 1)  # the running mean stays 0
x = (x - x.mean()) / x.std(unbiased=False) + 1.5
layer = BatchRenorm1d(1, momentum=0.0, warmup_steps=10)
apart = []
for step in range(101):
    y = layer.train()(x).detach()
    apart.append((y - layer.eval()(x).detach()).abs().max().item())
print(f"torchrl {torchrl.__version__}, torch {torch.__version__}")
print({step: round(apart[step], 3) for step in (0, 9, 10, 19, 20, 30, 100)})
print("num_batches_tracked", int(layer.num_batches_tracked))
assert apart[0] > 1 and max(apart[10:20]) < 1e-3  # in the warm-up a batch norm; then the running statistics
assert abs(apart[20] - 1.5) < 0.01 and abs(apart[30] - 3) < 0.01 and abs(apart[100] - 13.5) < 0.05
assert int(layer.num_batches_tracked) == 101
END
