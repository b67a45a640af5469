#!/usr/bin/env bash
# PyTorch 2.13.0: with load_state_dict(..., assign=True) two networks that are loaded from one state dict share their
# running statistics: training the one moves the evaluation of the other, and the dict.
#
# Guess before: parameters may be shared, as the documentation says that the tensors of the dict are kept, and an
# optimizer that changes them in place shows soon. Batch norm's buffers are replaced at each step, not written into,
# so they part.
# Seen: they are written in place. One forward pass of `a` in training mode, without an optimizer, changes what `b`,
# which is in evaluation mode, gives; the dict, meant to be the checkpoint, has moved as well.
#
#   findings/assigned_statistics.sh [PYTHON]         a Python that PyTorch 2.13 is there for
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import torch

x = torch.arange(24.0).reshape(8, 3)


def outcome(assign):
    checkpoint = torch.nn.BatchNorm1d(3).state_dict()
    a, b = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).eval()
    for layer in (a, b):
        layer.load_state_dict(checkpoint, assign=assign)
    before = b(x)
    a(x)
    return (b(x) - before).abs().max().item(), checkpoint["running_mean"].abs().max().item()


found = {assign: outcome(assign) for assign in (False, True)}
for assign, (difference, mean) in found.items():
    print(f"torch {torch.__version__}, assign={assign}: b's output moves by {difference:.3g}, the mean to {mean:.3g}")
assert found[False] == (0, 0)
assert found[True][0] > 1 and found[True][1] > 1
END
