#!/usr/bin/env bash
# torch-geometric 2.8.1: HeteroBatchNorm is not BatchNorm with a type: in training no gradient goes through the
# batch's mean and variance, epsilon is the least variance rather than added to it, and the variance is E[x^2] -
# E[x]^2.
#
# Guess before: with one type the output and the gradient are PyTorch's, and only the running variance (biased)
# differs.
# Seen: outputs agree; the gradient of x is that of a fixed slope and shift: over 64 rows it sums to 19 where
# PyTorch's sums to 0. At variance 1e-5 the output is 1.41 times PyTorch's; at mean 1e4 and standard deviation 1 it is
# off by 990.
#
#   findings/hetero_gradient.sh [PYTHON]             a Python that PyTorch 2.13 is there for
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch-geometric==2.8.1 torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import torch
import torch_geometric
from torch_geometric.nn import HeteroBatchNorm

torch.manual_seed(0)
z, cotangent = torch.randn(64, 3), torch.randn(64, 3)
types = torch.zeros(64, dtype=torch.long)


def both(x):
    found = []
    for apply in (lambda x: HeteroBatchNorm(3, num_types=1)(x, types), torch.nn.BatchNorm1d(3)):
        leaf = x.clone().requires_grad_()
        y = apply(leaf)
        y.backward(cotangent)
        found.append((y.detach(), leaf.grad))
    return found


(y, gradient), (y_torch, gradient_torch) = both(z)
fixed = cotangent / z.var(0, unbiased=False).sqrt()
small, small_torch = (output for output, _ in both((z - z.mean(0)) / z.std(0, unbiased=False) * 1e-5**0.5))
far, far_torch = (output for output, _ in both(z + 1e4))
ratio = (small / small_torch).median().item()
print(f"torch-geometric {torch_geometric.__version__}, torch {torch.__version__}")
print(f"outputs differ by {(y - y_torch).abs().max():.2g}")
print(f"sums of the gradient {gradient.sum(0).abs().max():.2g}, of PyTorch's {gradient_torch.sum(0).abs().max():.2g}")
print(f"difference from the gradient of fixed statistics {(gradient - fixed).abs().max():.2g}")
print(f"variance 1e-5: {ratio:.3f} of PyTorch's; mean 1e4: off by {(far - y_torch).abs().max():.2g}, PyTorch's "
      f"{(far_torch - y_torch).abs().max():.2g}")
torch.testing.assert_close(y, y_torch, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(gradient, fixed, rtol=1e-4, atol=1e-5)
assert gradient.sum(0).abs().max() > 1 and gradient_torch.sum(0).abs().max() < 1e-4
assert abs(ratio - 2**0.5) < 0.01
assert (far - y_torch).abs().max() > 100 and 0.1 > (far_torch - y_torch).abs().max()
END
