#!/usr/bin/env bash
# coremltools 9.0: in a conversion to float16, its default, a batch norm that no convolution takes in has every variance
# and epsilon below 6e-8 raised to 6e-8, the smallest number of float16, and is computed in float16. Features with a small
# variance come out too small, by 11 times at 1e-9 with an epsilon of 1e-12. One variance that float16 cannot hold at the
# other end, 1e5, keeps the whole norm in float32, and the small variances beside it as they were.
#
# Guess before: an epsilon of 1e-12 becomes 0 in float16, variances keep float32 or are folded into a scale before they are
# rounded, and a norm without a convolution is folded as one behind a convolution is.
# Seen: neither. Behind a convolution the norm is folded in float32: there 1e-9 has the right scale, 3.16e4.
#
#   findings/coreml_small_variance.sh [PYTHON]                    3.11 to 3.13
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet coremltools==9.0 numpy==2.4.6
cat > converted.py << 'END'
"""What a batch norm with some variances is converted to: of a program that pools or convolves, then normalizes."""

import logging
import warnings

import numpy as np

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
import coremltools
from coremltools.converters.mil import Builder


def converted(layer, variances, epsilon=1e-12):
    count = len(variances)
    variances = np.array(variances, np.float32)

    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=(1, count, 4, 4))], opset_version=coremltools.target.iOS16
    )
    def program(x):
        if layer == "convolution":
            x = Builder.conv(x=x, weight=np.eye(count, dtype=np.float32).reshape(count, count, 1, 1))
        else:
            x = Builder.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        zero, one = np.zeros(count, np.float32), np.ones(count, np.float32)
        return Builder.batch_norm(x=x, mean=zero, variance=variances, gamma=one, beta=zero, epsilon=np.float32(epsilon))

    model = coremltools.convert(
        program, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS16
    )
    found = {op.op_type: op for op in model._mil_program.functions["main"].operations}
    if "batch_norm" in found:
        norm = found["batch_norm"]
        return norm.x.dtype.__name__, norm.variance.val, norm.epsilon.val
    return found["conv"].x.dtype.__name__, np.diagonal(found["conv"].weight.val[..., 0, 0]), None


dtype, variance, epsilon = converted("pool", [1, 1e-9])
print(f"behind a pool: {dtype}, variances 1 and 1e-9 are {variance}, an epsilon of 1e-12 is {epsilon}")
kept = np.sqrt((1e-9 + 1e-12) / (np.float64(variance[1]) + np.float64(epsilon)))
print(f"the second feature comes out at {kept:.3f} of what it is")
assert dtype == "fp16" and variance[1] == epsilon == np.float16(6e-8) and 0.08 < kept < 0.1

dtype, variance, epsilon = converted("pool", [1, 1e-9, 1e5])
print(f"with a third of 1e5: {dtype}, variances {variance}, epsilon {epsilon}")
assert dtype == "fp32" and variance[1] == np.float32(1e-9) and epsilon == np.float32(1e-12)

dtype, scale, _ = converted("convolution", [1, 1e-9])
print(f"behind a convolution: {dtype}, folded to scales {scale}")
assert dtype == "fp16" and abs(scale[1] / (1e-9 + 1e-12) ** -0.5 - 1) < 1e-3
END
venv/bin/python converted.py 2> /dev/null
echo "as described"
