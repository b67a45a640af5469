"""Flax's norm in the place of jbn's."""

from flax import linen


def batch_norm(x, params, state, *, train, decay, epsilon, axis_name, activation):
    """Flax's BatchNorm with the arguments of `jbn.batch_norm`; the weight of the state stays what it is."""
    layer = linen.BatchNorm(
        not train, momentum=decay, epsilon=epsilon, dtype=x.dtype, use_scale=False, axis_name=axis_name
    )
    variables = {"params": {"bias": params.bias}, "batch_stats": {"mean": state.mean, "var": state.var}}
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    return activation(y), state._replace(**updated["batch_stats"])  # pyright: ignore[reportIndexIssue]
