"""Many places: clients that share no images, and what becomes of their running statistics.

A network of dense layers on MNIST, five clients with different numbers of images: two labels each, or all at random.
"""

from functools import partial
from typing import Any, NamedTuple

import claim
import figures
import images
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networks
import numpy as np
import optax

import jbn

ROWS = (48, 40, 32, 24, 16)  # of each client in a step; and in this proportion its images
LOCAL = 10  # steps between two averages
DEPTH = 3
RATES = (0.03, 0.1, 0.3)
SPLITS = ("at random", "two labels each")
CLIENTS = "clients"


class Places(NamedTuple):
    x: jax.Array  # [clients, images, features], those of a client first, then nothing
    labels: jax.Array  # [clients, images]
    counts: jax.Array  # [clients]
    test: jax.Array  # [test, features]
    test_labels: jax.Array  # [test]


def split(data: images.Images, how: str, per_row: int) -> Places:
    counts = per_row * np.array(ROWS)
    order = np.arange(len(data.train_labels))
    if how == "at random":
        starts = np.cumsum([0, *counts[:-1]])
        parts = [order[start : start + count] for start, count in zip(starts, counts, strict=True)]
    else:
        whose = data.train_labels // 2
        parts = [order[whose == client][:count] for client, count in enumerate(counts)]
    counts = np.array([len(part) for part in parts])
    padded = [np.resize(part, counts.max()) for part in parts]
    x, labels = (np.stack([values[rows] for rows in padded]) for values in (data.train, data.train_labels))
    return Places(*map(jnp.asarray, (x, labels, counts, data.test, data.test_labels)))


def draw_rows(key, counts):
    """[clients, rows] of a step, and which of them count."""
    keys = jax.random.split(key, len(ROWS))
    rows = jax.vmap(lambda key, count: jax.random.randint(key, (max(ROWS),), 0, count))(keys, counts)
    return rows, jnp.arange(max(ROWS)) < jnp.array(ROWS)[:, None]


def loss_of(params, states, x, labels, weights, norm, total=None):
    """Mean over the rows that count, or their share of a mean over `total` rows; and the new states."""
    logits, states, _ = networks.apply(params, states, x, norm, train=True, weights=weights)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weights) / (jnp.sum(weights) if total is None else total), states


def pooled_norm(x, params, state, *, train, weights=None):
    return jbn.batch_norm(x, params, state, train=train, weights=weights, axis_name=CLIENTS if train else None)


def given_norm(x, params, state, *, train, weights=None):
    del train
    return jbn.normalize_running(x, params, state, weights=weights), state


def descend(params, gradients, rate):
    return jax.tree.map(lambda value, gradient: value - rate * gradient, params, gradients)


def centralized(places, params, states, key, rate):
    """One step on all rows in one place."""
    rows, counted = draw_rows(key, places.counts)
    x, labels = (jax.vmap(lambda of, rows: of[rows])(of, rows) for of in (places.x, places.labels))
    flat = x.reshape(-1, x.shape[-1]), labels.ravel(), counted.ravel()
    gradients, states = jax.grad(loss_of, has_aux=True)(params, states, *flat, networks.batch_norm)
    return descend(params, gradients, rate), states


def pooled(places, params, states, key, rate):
    """The same step, each client with its own rows: statistics and gradients are summed over a named axis."""
    rows, counted = draw_rows(key, places.counts)

    def client(x, labels, rows, counted):
        gradient = jax.grad(loss_of, has_aux=True)
        return gradient(params, states, x[rows], labels[rows], counted, pooled_norm, sum(ROWS))

    each = jax.vmap(client, out_axes=(0, None), axis_name=CLIENTS)
    gradients, states = each(places.x, places.labels, rows, counted)
    return descend(params, jax.tree.map(lambda each: jnp.sum(each, 0), gradients), rate), states


def locally(places, params, states, keys, rate, norm):
    """LOCAL steps of every client from its own params and states, all [clients, ...]."""

    def step(carry, key):
        params, states = carry
        rows, counted = draw_rows(key, places.counts)

        def client(params, states, x, labels, rows, counted):
            gradient = jax.grad(loss_of, has_aux=True)
            gradients, states = gradient(params, states, x[rows], labels[rows], counted, norm)
            return descend(params, gradients, rate), states

        return jax.vmap(client)(params, states, places.x, places.labels, rows, counted), None

    return jax.lax.scan(step, (params, states), keys)[0]


def average(tree, counts):
    """[clients, ...] by counts."""
    shares = counts / jnp.sum(counts)
    return jax.tree.map(lambda each: jnp.tensordot(shares, each, 1), tree)


def to_all(tree):
    return jax.tree.map(lambda each: jnp.broadcast_to(each, (len(ROWS), *each.shape)), tree)


def merged(states, counts):
    """One of [clients, ...]: within plus between."""
    each = [jax.tree.map(lambda field, client=client: field[client], states) for client in range(len(ROWS))]
    return jbn.merge_states(*each, shares=counts)


def is_params(leaf):
    return isinstance(leaf, jbn.Params)


def keep_own(new, old):
    """`new` with the norms of `old`."""
    return jax.tree.map(lambda new, old: old if is_params(new) else new, new, old, is_leaf=is_params)


def rounds_of(places, params, states, keys, rate, norm, own_norms=False):
    """Federated averaging: params [clients, ...], states [clients, ...] as they are before the last average."""

    def one(carry, keys):
        params, states = carry
        params, states = locally(places, params, states, keys, rate, norm)
        mean = to_all(average(params, places.counts))
        if own_norms:
            return (keep_own(mean, params), states), None
        return (mean, to_all(merged(states, places.counts))), states

    (params, states), last = jax.lax.scan(one, (to_all(params), to_all(states)), keys)
    return params, states if own_norms else jax.tree.map(lambda field: field[-1], last)


def served_rounds(places, params, states, keys, rate):
    """Each round measures once, pooled, and the clients' steps are normalized by that."""

    def one(carry, keys):
        params, states = carry
        _, states = pooled(places, params, states, keys[0], 0.0)
        params, _ = locally(places, to_all(params), to_all(states), keys, rate, given_norm)
        return (average(params, places.counts), states), None

    (params, states), _ = jax.lax.scan(one, (params, states), keys)
    _, states = pooled(places, params, states, keys[0, 0], 0.0)
    return params, states


def accuracy(params, states, places, norm=networks.batch_norm):
    return networks.accuracy(params, states, places.test, places.test_labels, norm)


def own_accuracy(params, states, places):
    """Of each client's own network on the test images of its own labels; the mean by their number."""

    def client(params, states, labels):
        logits, _, _ = networks.apply(params, states, places.test, networks.batch_norm, train=False)
        mine = jnp.isin(places.test_labels, labels)
        return jnp.sum(mine * (jnp.argmax(logits, -1) == places.test_labels)), jnp.sum(mine)

    right, count = jax.vmap(client)(params, states, places.labels)
    return jnp.sum(right) / jnp.sum(count)


def measure_all(params, states, batch):
    """For `jbn.recalibrate`; a client is a lane, and sends count, mean and variance of its images, no image."""

    def client(x, weights):
        return networks.apply(params, states, x, pooled_norm, train=True, weights=weights)[1]

    return None, jax.vmap(client, out_axes=None, axis_name=CLIENTS)(*batch)


def measured_again(places, params, states):
    """The exact statistics of all clients' images for these params."""
    valid = jnp.arange(places.x.shape[1]) < places.counts[:, None]
    return jbn.recalibrate(measure_all, params, states, [(places.x, valid)])


class Trained(NamedTuple):
    params: Any
    states: Any  # of FedAvg those of each client


NORMS = {"FedAvg, layer norm": networks.layer_norm, "FedAvg, without": networks.none}
METHODS = ("centralized", "pooled", "FedAvg", "served", "FedBN", "FedAvg, layer norm", "FedAvg, without")


def trained(method, places, size, seed, rate):
    start, draw = jax.random.split(jax.random.key(seed))
    params, states = networks.init(start, places.x.shape[-1], size.width, DEPTH, 10)
    keys = jax.random.split(draw, (max(1, size.steps // LOCAL), min(LOCAL, size.steps)))
    if method in ("centralized", "pooled"):
        step = {"centralized": centralized, "pooled": pooled}[method]

        def one(carry, key):
            params, states = carry
            return step(places, params, states, key, rate), None

        return Trained(*jax.lax.scan(one, (params, states), keys.ravel())[0])
    if method == "served":
        return Trained(*served_rounds(places, params, states, keys, rate))
    norm = NORMS.get(method, networks.batch_norm)
    return Trained(*rounds_of(places, params, states, keys, rate, norm, own_norms=method == "FedBN"))


def evaluated(method, places, found: Trained, fresh) -> dict:
    """Accuracies by what is done with the statistics; for FedAvg also how its variances are off."""
    params, states = found
    if method in ("centralized", "pooled", "served"):
        return {method: accuracy(params, states, places)}
    if method == "FedBN":
        return {
            "FedBN, own labels": own_accuracy(params, states, places),
            "FedBN, all labels": jnp.mean(jax.vmap(accuracy, (0, 0, None))(params, states, places)),
        }
    params = jax.tree.map(lambda each: each[0], params)
    if method != "FedAvg":
        return {method: accuracy(params, fresh, places, NORMS[method])}
    averaged, whole = average(states, places.counts), merged(states, places.counts)
    ratio = jnp.stack([jnp.median(averaged["first"].var / whole["first"].var)])
    rest = jnp.median(averaged["rest"].var / whole["rest"].var, -1)
    return {
        "FedAvg, statistics forgotten": accuracy(params, fresh, places),
        "FedAvg, variances averaged": accuracy(params, averaged, places),
        "FedAvg, states merged": accuracy(params, whole, places),
        "ratio": jnp.concatenate([ratio, rest]),
    }


def jobs(folder, size) -> claim.Jobs:
    def run(how, method):
        data = images.mnist(folder).halved.rows.first(60_000, 2 * size.images)
        places = split(data, how, max(1, size.steps // 15))
        seeds, rates = (np.ravel(each) for each in np.meshgrid(np.arange(size.seeds), RATES, indexing="ij"))
        _, fresh = networks.init(jax.random.key(0), places.x.shape[-1], size.width, DEPTH, 10)

        @jax.jit
        @partial(jax.vmap, in_axes=(0, 0, None))
        def all_of(seed, rate, places):
            found = trained(method, places, size, seed, rate)
            return found, evaluated(method, places, found, fresh)

        found, accuracies = all_of(seeds, rates, places)
        if method == "FedAvg":
            again = []
            for member in range(len(seeds)):
                params, states = jax.tree.map(lambda each, member=member: each[member, 0], tuple(found))
                again.append(accuracy(params, measured_again(places, params, states), places))
            accuracies["FedAvg, measured again"] = np.array(again)
        shape = (size.seeds, len(RATES))
        return {name: np.reshape(values, (*shape, *values.shape[1:])) for name, values in accuracies.items()}

    return {f"{how}, {method}": partial(run, how, method) for how in SPLITS for method in METHODS}


def rows_of(found) -> dict[str, dict[str, np.ndarray]]:
    """By method and split, accuracy [seeds] in percent at the rate that is best for the mean."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    for job, values in found.items():
        how = job.split(", ")[0]
        for name, accuracies in values.items():
            if name not in ("took", "ratio"):
                percent = 100 * claim.array(accuracies)
                rows.setdefault(name, {})[how] = percent[:, percent.mean(0).argmax()]
    return rows


def draw(found, path) -> None:
    rows = rows_of(found)
    figure, axes = plt.subplots(1, 2, figsize=(15, 6), sharey=True)
    for axis, how in zip(axes, SPLITS, strict=True):
        low, middle, high = (
            [function(values[how]) for values in rows.values()] for function in (np.min, np.mean, np.max)
        )
        places = np.arange(len(rows))
        color = [figures.OWN if name in ("pooled", "centralized") else "silver" for name in rows]
        axis.barh(places, middle, color=color)
        axis.hlines(places, low, high, color="black", linewidth=1.5)
        for place, value in zip(places, middle, strict=True):
            axis.text(2, place, f"{value:.1f}", va="center")
        axis.set(title=f"five clients, {how}", xlabel="accuracy on all test images, %", xlim=(0, 105))
        axis.set_yticks(places, list(rows))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    figure.suptitle("Clients with labels of their own: what is done with the statistics decides")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = [f"| accuracy, % | {' | '.join(SPLITS)} |", "| --- | --- | --- |"]
    for name, values in rows_of(found).items():
        lines.append(f"| {name} | {' | '.join(claim.spread(values[how]) for how in SPLITS)} |")
    lines += [
        "",
        "| averaged variance, of the merged one | " + " | ".join(f"layer {n + 1}" for n in range(DEPTH)) + " |",
    ]
    lines.append("| --- |" + " --- |" * DEPTH)
    for how in SPLITS:
        ratio = claim.array(found[f"{how}, FedAvg"]["ratio"])[:, RATES.index(0.1)]
        lines.append(f"| {how} | {' | '.join(claim.spread(layer, '{:.2f}') for layer in ratio.T)} |")
    return lines
