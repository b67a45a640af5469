"""The network of examples/cifar10/model.py in Flax's own modules, as a peer: same layers, same starting values."""

import jax
import jax.numpy as jnp
import model
from flax import linen as nn


class ResNet(nn.Module):
    depth: int
    axis_name: str | None = None
    decay: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        def unit(x, name, features, size, stride=1):
            x = nn.Conv(
                features, (size, size), stride, use_bias=False, dtype=x.dtype, name=flat(name, "conv"), padding="SAME"
            )(x)
            return nn.BatchNorm(
                not train, momentum=self.decay, dtype=x.dtype, axis_name=self.axis_name, name=flat(name, "norm")
            )(x)

        x = nn.relu(unit(images, "stem", 16, 3))
        for name, inputs, outputs, stride in model.blocks(self.depth):
            shortcut = x if inputs == outputs else unit(x, f"{name}/shortcut", outputs, 1, stride)
            x = nn.relu(unit(x, f"{name}/conv1", outputs, 3, stride))
            x = nn.relu(unit(x, f"{name}/conv2", outputs, 3) + shortcut)
        return nn.Dense(10, name="head")(jnp.mean(x, (1, 2), dtype=jnp.float32))


def flat(name: str, part: str) -> str:
    return f"{name.replace('/', '_')}_{part}"


def convert(params: dict) -> tuple[dict, dict]:
    """Flax's params and batch statistics from the params of model.py."""
    peer, statistics = {"head": params["head"]}, {}
    for name, unit in params.items():
        if name != "head":
            peer[flat(name, "conv")] = {"kernel": unit["kernel"]}
            peer[flat(name, "norm")] = unit["norm"]._asdict()
            size = unit["norm"].scale.shape
            statistics[flat(name, "norm")] = {"mean": jnp.zeros(size), "var": jnp.ones(size)}
    return peer, statistics


def apply(params, state, images, *, depth, train, axis_name=None):
    """As model.apply."""
    network = ResNet(depth, axis_name)
    variables = {"params": params, "batch_stats": state}
    if not train:
        return network.apply(variables, images, train), state
    logits, updated = network.apply(variables, images, train, mutable=["batch_stats"])
    return logits, updated["batch_stats"]
