#!/usr/bin/env bash
# MLX 0.32.4 (its CPU backend): BatchNorm of float16 data sums squares in float16: with 100,352 rows of standard normal
# data, as 32 images of 56 by 56 are, all outputs of a training step are 0 and the running variance, a float32, is NaN.
#
# Guess before: the sums are made in float32, as in PyTorch, and data of a standard deviation of up to 256 is
# normalized; beyond, the variance is inf.
# Seen: what counts is the sum over the batch, 65,504 at most: 1,024 rows of standard deviation 20, or 64 of 100, are
# too much: the output is the bias, without a warning, and the running variance is inf for ever (NaN where the number of
# rows is too much as well). The same data as float32 is right, and so is PyTorch's layer on the float16 data.
#
#   findings/mlx_float16.sh [PYTHON]                 a Python that PyTorch 2.13 is there for
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "mlx[cpu]==0.32.4" torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - << 'END'
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import torch
from mlx import nn


def by_mlx(x):
    layer = nn.BatchNorm(3)
    y = np.array(layer(mx.array(x)).astype(mx.float32))
    return y.std(0), np.array(layer.running_var)


def by_torch(x):
    layer = torch.nn.BatchNorm1d(3)
    y = layer(torch.from_numpy(x)).detach().numpy().astype("f4")
    return y.std(0), layer.running_var.numpy()


print(f"mlx {version('mlx')}, torch {torch.__version__}: standard deviation of the output, running variance")
for rows, std in ((64, 20), (64, 100), (1024, 20), (100_352, 1)):
    x = np.random.default_rng(0).normal(0, std, (rows, 3)).astype("f2")
    half, single, torch_half = by_mlx(x), by_mlx(x.astype("f4")), by_torch(x)
    print(f"{rows} rows of {std}: float16 {half}, float32 {single}, torch float16 {torch_half}")
    for output, running in (single, torch_half):
        np.testing.assert_allclose(output, 1, rtol=0.01)
        assert np.isfinite(running).all()
    if rows * std**2 < 65504:
        np.testing.assert_allclose(half[0], 1, rtol=0.01)
    else:
        assert not half[0].any() and not np.isfinite(half[1]).any()
END
