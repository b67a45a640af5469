#!/usr/bin/env bash
# PyTorch 2.13.0: torch.jit.trace of a network in training mode moves its running statistics five times, as its check
# of the trace runs the network again, and again; without the check once. torch.export does not move them.
#
# Guess before: once, as an example is run; the check is made on a copy, or puts back what it found.
# Seen: num_batches_tracked is 5 after one call, and the running mean has gone 1 - 0.9^5 = 41 % of the way to the
# example's. An example that is not data, such as torch.zeros, is what it went to.
#
#   findings/trace_moves_statistics.sh [PYTHON]      a Python that PyTorch 2.13 is there for
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import warnings

import torch

warnings.simplefilter("ignore")  # torch.jit is deprecated, and says so
example = torch.arange(24.0).reshape(8, 3)


def moved(trace):
    layer = torch.nn.BatchNorm1d(3)
    trace(layer)
    share = (layer.running_mean / example.mean(0)).mean().item()
    return layer.num_batches_tracked.item(), round(share, 3)


found = {
    "torch.jit.trace": moved(lambda layer: torch.jit.trace(layer, example)),
    "torch.jit.trace, check_trace=False": moved(lambda layer: torch.jit.trace(layer, example, check_trace=False)),
    "torch.export": moved(lambda layer: torch.export.export(layer, (example,))),
}
for name, (steps, share) in found.items():
    print(f"torch {torch.__version__}, {name}: {steps} steps, {share} of the way")
assert list(found.values()) == [(5, 0.41), (1, 0.1), (0, 0.0)]
END
