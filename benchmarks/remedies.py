"""What is done about small batches: normalizations of the example's network for training on a batch of several workers.

Each takes x [batch, height, width, features], params, a dict of `jbn.State`, and the number of images of each worker;
it gives back y and the new states. Image i is of worker i // size. The states, by whose images they have seen:
"one worker", the first of them, or "all workers".
"""

import jax

import jbn

CHANNEL_GROUPS = 8  # of group norm


def batch_norm(x, params, states, size, limits):
    """Batch norm, each worker by its own statistics; the running ones of one worker, and as `groups` pools them."""
    y, measured = jbn.normalize_batch(x, params, groups=len(x) // size)
    one_worker = jbn.update(states["one worker"], jbn.moments(x[:size]))
    return y, {"one worker": one_worker, "all workers": jbn.update(states["all workers"], measured)}


def synchronized(x, params, states, size, limits):
    """Batch norm, all workers by the statistics of all."""

    def of_worker(x):
        return jbn.batch_norm(x, params, states["all workers"], train=True, axis_name="workers")

    y, state = jax.vmap(of_worker, out_axes=(0, None), axis_name="workers")(cut(x, size))
    return y.reshape(x.shape), {"all workers": state}


def renormalized(x, params, states, size, limits):
    """Batch renormalization, each worker by its own statistics within `limits` of the running ones, those of all."""
    state, (r_max, d_max) = states["all workers"], limits

    def of_worker(x):
        return jbn.batch_renorm(x, params, state, train=True, r_max=r_max, d_max=d_max)[0]

    return jax.vmap(of_worker)(cut(x, size)).reshape(x.shape), {"all workers": jbn.update(state, jbn.moments(x))}


def group_norm(x, params, states, size, limits):
    """Group norm (Wu & He 2018, section 3.1): statistics of one image, over neighbouring features."""
    parts = x.reshape(*x.shape[:3], CHANNEL_GROUPS, -1)
    y, _ = jbn.normalize_batch(parts, jbn.Params(None, None), feature_axis=(0, 3))
    return y.reshape(x.shape) * params.scale + params.bias, states


def scale_and_bias(x, params, states, size, limits):
    """Scale and bias alone."""
    return x * params.scale + params.bias, states


def normalize(remedy, activation, *operands):
    """The remedy of that name, and the activation behind it."""
    y, states = globals()[remedy](*operands)
    return y if activation is None else activation(y), states


def cut(x, size):
    return x.reshape(-1, size, *x.shape[1:])


RUNNING = {  # of each, the states that it keeps
    "batch_norm": ("one worker", "all workers"),
    "synchronized": ("all workers",),
    "renormalized": ("all workers",),
    "group_norm": (),
    "scale_and_bias": (),
}
