"""The table: how each library means batch norm. `jbn.convert`, `jbn.presets` and docs/libraries.md are made of it.

Title, version, names, unbiased, decay, what its number weighs, epsilon: see `library.py`.
"""

import re
from difflib import get_close_matches

from jbn._libraries.library import Library
from jbn._libraries.surprises import SURPRISES


def row(name: str, epsilon: float | None = None) -> Library:
    """The row of a library by its name; of a layer with another `epsilon` than the default."""
    if not isinstance(name, str):
        raise TypeError(f"library is a {type(name).__name__}; expected a name such as 'torch', behind the entries.")
    if name in LIBRARIES:
        return LIBRARIES[name] if epsilon is None else LIBRARIES[name]._replace(epsilon=epsilon)
    known = {key: key for key in LIBRARIES} | {library.title.lower(): key for key, library in LIBRARIES.items()}
    asked = name.lower()
    called = [key for key, library in LIBRARIES.items() if asked in re.split(r"[\s,.]+", library.title.lower())]
    near = called or dict.fromkeys(known[match] for match in get_close_matches(asked, known, 3, 0.5))
    meant = f" Is it {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"library is {name!r}; expected one of {', '.join(map(repr, LIBRARIES))}.{meant}")


TORCH = ("weight", "bias", "running_mean", "running_var")
FLAX = ("scale", "bias", "mean", "var")
KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
HAIKU = ("scale", "offset", "mean_ema.average", "var_ema.average")
SONNET = ("scale", "offset", "moving_mean.average", "moving_variance.average")
MXNET = ("gamma", "beta", "running_mean", "running_var")
MXNET_OPERATOR = ("gamma", "beta", "moving_mean", "moving_var")
CLAMPED = "It divides by the root of max(var, epsilon): by epsilon / (2 var) less."
UNBIASED = "It normalizes by the unbiased variance of the batch."
SONNET_VECTORS = Library(
    "Sonnet, 2-D and 3-D input",
    "2.0.2",
    SONNET,
    False,
    0.999,
    "old",
    needed=("moving_mean.hidden", "moving_mean.counter", "moving_variance.hidden", "moving_variance.counter"),
    running="[1, .., C]",
    evidence="average",
)
FIXED_GAMMA = Library(
    "MXNet operator",
    "1.9.1",
    MXNET_OPERATOR,
    False,
    0.9,
    "old",
    1e-3,
    collections=("arg", "aux"),
    separators="./_",
    scale="fixed",
)

ROWS = {
    "torch": Library("PyTorch", "2.13.0", TORCH, True, 0.9, "new", counter="num_batches_tracked"),
    "torchvision frozen": Library(
        "torchvision FrozenBatchNorm2d", "0.28.0", TORCH, True, 1.0, "", ignored=("num_batches_tracked",)
    ),
    "timm": Library("timm BatchNormAct2d", "1.0.31", TORCH, True, 0.9, "new", counter="num_batches_tracked"),
    "torch geometric": Library(
        "PyTorch Geometric BatchNorm",
        "2.8.1",
        ("module.weight", "module.bias", "module.running_mean", "module.running_var"),
        True,
        0.9,
        "new",
        counter="module.num_batches_tracked",
    ),
    "torch geometric hetero": Library(
        "PyTorch Geometric HeteroBatchNorm",
        "2.8.1",
        TORCH,
        False,
        0.9,
        "new",
        counter="num_batches_tracked",
        shape="[types, C]",
        evaluation=CLAMPED,
        training=CLAMPED,
    ),
    "flax": Library(
        "Flax, linen and nnx",
        "0.12.12",
        FLAX,
        False,
        0.99,
        "old",
        collections=("params", "batch_stats"),
        shape="[*features]",
    ),
    "keras": Library("Keras 3", "3.15.1", KERAS, False, 0.99, "old", 1e-3, shape="[*features]"),
    "tensorflow": Library(
        "TensorFlow, fused", "2.21.0", ("scale", "offset", "mean", "variance"), True, 0.99, "new", 1e-3
    ),
    "tensorflow keras": Library(
        "tf.keras 2, fused", "2.21.0", KERAS, True, 0.99, "old", 1e-3, read="its operation is that of tensorflow"
    ),
    "haiku": Library(
        "Haiku",
        "0.0.17",
        HAIKU,
        False,
        0.9,
        "old",
        needed=("mean_ema.hidden", "mean_ema.counter", "var_ema.hidden", "var_ema.counter"),
        shape="[1, .., *features]",
        evidence="average",
    ),
    "sonnet": SONNET_VECTORS,
    "sonnet images": SONNET_VECTORS._replace(title="Sonnet, 4-D input", unbiased=True),
    "equinox ema": Library(
        "Equinox, mode ema",
        "0.13.8",
        ("weight", "bias", "mean", "var"),
        False,
        0.99,
        "old",
        needed=("first_time",),
        evidence="first",
        nameless="leaves by their order",
        training="It normalizes by the running statistics that it has just moved.",
    ),
    "equinox batch": Library(
        "Equinox, mode batch",
        "0.13.8",
        ("weight", "bias", "mean", "var"),
        False,
        0.99,
        "old",
        needed=("counter",),
        evidence="hidden",
        nameless="leaves by their order",
        evaluation="The division leaves momentum^counter / (1 - momentum^counter) of the initial 1 in its variance.",
    ),
    "onnx": Library("ONNX in onnxruntime", "1.31.1", ("scale", "B", "mean", "var"), False, 0.9, "old"),
    "paddle": Library("PaddlePaddle", "3.3.1", ("weight", "bias", "_mean", "_variance"), False, 0.9, "old"),
    "mxnet": Library("MXNet Gluon", "1.9.1", MXNET, False, 0.9, "old", collections=("arg", "aux"), separators="./_"),
    "mxnet operator": FIXED_GAMMA,
    "mxnet operator free": FIXED_GAMMA._replace(title="MXNet operator, fix_gamma=False", scale="plain"),
    "mindspore": Library("MindSpore", "2.10.0", KERAS, True, 0.9, "old"),
    "chainer": Library(
        "Chainer", "7.8.1", ("gamma", "beta", "avg_mean", "avg_var"), True, 0.9, "old", 2e-5, counter="N"
    ),
    "mlx": Library("MLX", "0.32.4", TORCH, True, 0.9, "new"),
    "tinygrad": Library("tinygrad", "0.14.0", TORCH, True, 0.9, "new", counter="num_batches_tracked"),
    "objax": Library("Objax", "1.8.0", MXNET, False, 0.999, "old", 1e-6, shape="[1, C, 1, 1]"),
    "nnabla": Library("NNabla", "1.39.0", ("gamma", "beta", "mean", "var"), True, 0.9, "old", shape="[1, C, 1, 1]"),
    "megengine": Library("MegEngine", "1.13.0", TORCH, True, 0.9, "old"),
    "e3nn": Library(
        "e3nn-jax, scalars",
        "0.21.0",
        ("weights", "biases", "mean", "var"),
        False,
        0.9,
        "new",
        1e-4,
        collections=("params", "batch_stats"),
        scale="blended",
    ),
    "brainstate": Library(
        "brainstate",
        "0.6.0",
        ("weight.scale", "weight.bias", "running_mean", "running_var"),
        False,
        0.99,
        "old",
        shape="[1, .., C]",
    ),
    "jittor": Library("Jittor", "1.3.11.0", TORCH, False, 0.9, "new"),
    "trax": Library(
        "Trax",
        "1.4.1",
        ("weights.1", "weights.0", "state.0", "state.1"),
        False,
        0.999,
        "old",
        counter="state.2",
        running="[1, .., C]",
        nameless="weights (beta, gamma) and state (mean, var, n_batches), in this order",
    ),
    "treex": Library("treex", "0.6.12", FLAX, False, 0.99, "old", ignored=("momentum",)),
    "nflows": Library(
        "nflows",
        "0.14",
        ("unconstrained_weight", "bias", "running_mean", "running_var"),
        True,
        0.9,
        "new",
        scale="softplus",
        start=0.0,
        training=UNBIASED,
    ),
    "pyro": Library(
        "Pyro",
        "1.9.2",
        KERAS,
        True,
        0.9,
        "new",
        scale="relu",
        training=UNBIASED,
    ),
    "sbx": Library(
        "sbx BatchRenorm",
        "0.28.0",
        FLAX,
        False,
        0.99,
        "old",
        1e-3,
        counter="steps",
        ignored=("r_max", "d_max"),
        collections=("params", "batch_stats"),
        shape="[*features]",
    ),
    "sb3 contrib": Library(
        "sb3-contrib BatchRenorm1d",
        "2.9.2",
        ("scale", "bias", "ra_mean", "ra_var"),
        True,
        0.99,
        "new",
        1e-3,
        counter="steps",
        training=UNBIASED,
    ),
    "torchrl": Library("torchrl BatchRenorm1d", "0.14.1", TORCH, True, 0.99, "new", counter="num_batches_tracked"),
    "ncnn": Library(
        "ncnn",
        "1.0.20261020",
        ("slope", "bias", "mean", "var"),
        False,
        1.0,
        "",
        0.0,
        nameless="slope, mean, variance and bias, in this order",
    ),
}

LIBRARIES = {name: library._replace(surprise=SURPRISES[name]) for name, library in ROWS.items()}
