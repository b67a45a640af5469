"""Claim 9, its last part: it is less effective in recurrent networks with long sequences. An LSTM, four ways."""

from functools import partial

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np
import optax
from jax import lax

import jbn

KINDS = {  # with its color
    "batch norm, statistics of each step": figures.OWN,
    "batch norm, statistics shared": figures.THIRD,
    "layer norm": "tab:purple",
    "none": figures.OTHER,
}
LENGTH = 30  # of the adding task in training
LONGER = (30, 60, 120)
BLANK = (0, 14, 28)  # rows below the image
RATE = 3e-3


def init(key, inputs: int, hidden: int, outputs: int, length: int, kind: str):
    """Params and states of an LSTM; Cooijmans et al. 2016 start the scales at 0.1."""
    keys = jax.random.split(key, 3)
    glorot = jax.nn.initializers.glorot_normal()
    sizes = {"x": 4 * hidden, "h": 4 * hidden, "c": hidden}
    start = 0.1 if kind.startswith("batch") else 1.0
    norms = {name: jbn.Params(jnp.full(size, start), None) for name, size in sizes.items()}
    states = {name: jbn.init(size)[1] for name, size in sizes.items()}
    if kind.endswith("each step"):
        states = jax.tree.map(lambda field: jnp.stack([field] * length), states)
    bias = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)  # of the gate that forgets
    params = {
        "x": glorot(keys[0], (inputs, 4 * hidden)),
        "h": jax.nn.initializers.orthogonal()(keys[1], (hidden, 4 * hidden)),
        "bias": bias,
        "head": glorot(keys[2], (hidden, outputs)),
        "norms": norms,
    }
    return params, states


def apply(params, states, x, kind: str, *, train: bool):
    """Outputs [batch, outputs] for x [time, batch, inputs], and the new states.

    Statistics of each step are stacked along time; steps beyond those of training take the last ones.
    """
    each, hidden = kind.endswith("each step"), params["head"].shape[0]

    def normalize(name, x, state):
        if kind == "none":
            return x, state
        if kind == "layer norm":
            return networks.layer_norm(x, params["norms"][name]._replace(bias=0.0), state, train=train)
        return jbn.batch_norm(x, params["norms"][name], state, train=train)

    def step(carry, now):
        h, c, shared = carry
        x, own = now
        state, new = (own if each else shared), {}
        of_x, new["x"] = normalize("x", x @ params["x"], state["x"])
        of_h, new["h"] = normalize("h", h @ params["h"], state["h"])
        i, f, o, g = jnp.split(of_x + of_h + params["bias"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        of_c, new["c"] = normalize("c", c, state["c"])
        h = jax.nn.sigmoid(o) * jnp.tanh(of_c)
        return (h, c, shared if each else new), new if each else None

    own = None
    if each:
        steps = jnp.minimum(jnp.arange(len(x)), len(states["c"].mean) - 1)
        own = jax.tree.map(lambda field: field[steps], states)
    start = jnp.zeros((x.shape[1], hidden)), jnp.zeros((x.shape[1], hidden)), states
    (h, _, shared), stacked = lax.scan(step, start, (x, own))
    return h @ params["head"], stacked if each else shared


def fit(kind, seeds, steps, hidden, length, inputs, outputs, draw, loss_of, evaluate):
    """Train with Adam; the loss of every step, and what `evaluate(apply)` gives, for every seed."""

    def one(seed):
        start, keys = jax.random.split(jax.random.key(seed))
        params, states = init(start, inputs, hidden, outputs, length, kind)
        descend = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))

        def step(carry, key):
            params, states, moving = carry
            x, target = draw(key)

            def loss(params):
                outputs, new = apply(params, states, x, kind, train=True)
                return loss_of(outputs, target), new

            (value, states), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            updates, moving = descend.update(gradients, moving)
            return (optax.apply_updates(params, updates), states, moving), value

        (params, states, _), losses = lax.scan(
            step, (params, states, descend.init(params)), jax.random.split(keys, steps)
        )
        exact = recalibrated(params, states)
        return losses, *(evaluate(lambda x, s=s: apply(params, s, x, kind, train=False)[0]) for s in (states, exact))

    def recalibrated(params, states):
        """The exact statistics of 20 batches: moments in the place of states accumulate."""
        if not kind.startswith("batch"):
            return states

        def one_more(moments, key):
            return apply(params, moments, draw(key)[0], kind, train=True)[1], None

        start = jbn.empty_moments(states)
        moments, _ = lax.scan(one_more, start, jax.random.split(jax.random.key(1), 20))
        settle = partial(jbn.update, decay=0.0)
        return jax.tree.map(settle, states, moments, is_leaf=lambda value: isinstance(value, jbn.State))

    losses, running, exact = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return {"loss": claim.smooth(losses), "running": running, "exact": exact}


def jobs(folder, size: claim.Size) -> claim.Jobs:
    shape = {"seeds": size.seeds, "steps": 2 * size.steps, "hidden": size.width // 2}
    batch = size.batch // 2

    def adding(kind):
        def evaluate(network):
            found = []
            for length in LONGER:
                x, target = images.adding(jax.random.key(length), 500 if batch > 8 else 10, length)
                found.append(jnp.mean((network(x)[:, 0] - target) ** 2))
            return jnp.stack(found)

        task = {"length": LENGTH, "inputs": 2, "outputs": 1, "evaluate": evaluate}

        def squares(outputs, target):
            return jnp.mean((outputs[:, 0] - target) ** 2)

        return fit(kind, draw=lambda key: images.adding(key, batch, LENGTH), loss_of=squares, **task, **shape)

    def rows(kind):
        data = images.mnist(folder).first(size.train, size.test)
        train, labels = jnp.asarray(data.train[..., 0]), jnp.asarray(data.train_labels)
        test, height = jnp.asarray(data.test[:1000, ..., 0]), data.train.shape[1]
        empty = float(train.min())

        def draw(key):
            chosen = jax.random.randint(key, (batch,), 0, len(labels))
            return train[chosen].swapaxes(0, 1), labels[chosen]

        def evaluate(network):
            found = []
            for below in BLANK:
                x = jnp.pad(test, ((0, 0), (0, below), (0, 0)), constant_values=empty).swapaxes(0, 1)
                found.append(jnp.mean(jnp.argmax(network(x), -1) == data.test_labels[: len(test)]))
            return jnp.stack(found)

        task = {"length": height, "inputs": train.shape[2], "outputs": 10, "evaluate": evaluate}
        return fit(kind, draw=draw, loss_of=networks.cross_entropy, **task, **shape)

    found: claim.Jobs = {}
    for kind in KINDS:
        found |= {f"adding, {kind}": partial(adding, kind), f"rows, {kind}": partial(rows, kind)}
    return found


def draw(found, path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5))
    for kind, color in KINDS.items():
        loss = claim.array(found[f"adding, {kind}"]["loss"])
        claim.band(axes[0], 10 * (1 + np.arange(loss.shape[1])), loss, color)
        claim.band(axes[1], LONGER, claim.array(found[f"adding, {kind}"]["running"]), color, marker="o")
        claim.band(
            axes[2],
            [28 + below for below in BLANK],
            100 * claim.array(found[f"rows, {kind}"]["running"]),
            color,
            marker="o",
        )
    axes[0].set(title="adding task, training", xlabel="step", ylabel="squared error", yscale="log")
    axes[1].set(title=f"adding task, evaluated, trained at {LENGTH}", xlabel="length", xticks=LONGER, yscale="log")
    axes[2].set(title="rows of an image, then blank rows", xlabel="rows", ylabel="test accuracy, %", ylim=(0, 102))
    axes[2].set_xticks([28 + below for below in BLANK])
    figures.names(axes[2], {kind: kind for kind in KINDS}, KINDS, at=(0.3, 0.7))
    figure.suptitle("An LSTM, evaluated at lengths beyond those of training")
    figures.save(figure, path)


def tell(found) -> list[str]:
    header = [*(f"adding, length {length}" for length in LONGER), *(f"rows and {below} blank, %" for below in BLANK)]
    lines = [f"| | {' | '.join(header)} |", "| --- |" + " --- |" * len(header)]
    for kind in KINDS:
        for statistics in ("running", "exact") if kind.startswith("batch") else ("exact",):
            adding = claim.array(found[f"adding, {kind}"][statistics]).T
            rows = 100 * claim.array(found[f"rows, {kind}"][statistics]).T
            cells = [claim.spread(values, "{:.2g}") for values in adding]
            cells += [claim.spread(values, "{:.0f}") for values in rows]
            name = f"{kind}, evaluated by {statistics} ones" if kind.startswith("batch") else kind
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
