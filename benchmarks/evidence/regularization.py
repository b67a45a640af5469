"""Claim 7: it regularizes. Test accuracy at matched training loss, beside dropout and weight decay."""

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

DEPTH = 4
KINDS = {  # what normalizes, the rate, and what else
    "nothing": (networks.none, 0.03, {}),
    "dropout 0.2": (networks.none, 0.03, {"dropout": 0.2}),
    "weight decay 0.003": (networks.none, 0.03, {"decay": 0.003}),
    "batch norm of 128": (networks.batch_norm, 0.03, {}),
    "batch norm of 8": (partial(networks.batch_norm, groups=16), 0.03, {}),
}
EVALUATIONS = 30
LOSSES = (1.4, 1.2, 1.0)


def jobs(folder, size: claim.Size) -> claim.Jobs:
    train, steps = min(size.train, 5_000), 6 * size.steps

    def run(norm, rate, dropout=0.0, decay=0.0):
        norm = partial(networks.batch_norm, groups=2) if size.batch < 128 and isinstance(norm, partial) else norm
        data = images.cifar10(folder).rows.first(train, size.test)
        arrays = jax.tree.map(jnp.asarray, data._replace(name=None))
        each = max(1, steps // EVALUATIONS)

        def one(seed, images):
            start, draw = jax.random.split(jax.random.key(seed))
            params, states = networks.init(start, images.train.shape[1], size.width, DEPTH, 10)
            descend = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))

            def step(carry, key):
                params, states, moving = carry
                rows = jax.random.randint(key, (size.batch,), 0, len(images.train))

                def activation(x):
                    x = jax.nn.relu(x)  # one mask for all layers of a step: enough for the comparison, and cheap
                    keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - dropout, x.shape)
                    return jnp.where(keep, x / (1 - dropout), 0) if dropout else x

                def loss(params):
                    x = images.train[rows]
                    logits, new, _ = networks.apply(params, states, x, norm, train=True, activation=activation)
                    return networks.cross_entropy(logits, images.train_labels[rows]), new

                gradients, states = jax.grad(loss, has_aux=True)(params)
                updates, moving = descend.update(gradients, moving, params)
                return (optax.apply_updates(params, updates), states, moving), None

            def several(carry, keys):
                carry, _ = lax.scan(step, carry, keys)
                params, states, _ = carry
                found = []
                for x, labels in ((images.train, images.train_labels), (images.test, images.test_labels)):
                    logits, _, _ = networks.apply(params, states, x, norm, train=False)
                    found += [networks.cross_entropy(logits, labels), jnp.mean(jnp.argmax(logits, -1) == labels)]
                return carry, jnp.stack(found)

            keys = jax.random.split(draw, (steps // each, each))
            return lax.scan(several, (params, states, descend.init(params)), keys)[1]

        values = jax.jit(jax.vmap(one, (0, None)))(jnp.arange(size.seeds), arrays)  # [seeds, evaluations, 4]
        names = ("train loss", "train accuracy", "test loss", "test accuracy")
        return {name: values[..., index] for index, name in enumerate(names)}

    return {
        name: lambda norm=norm, rate=rate, others=others: run(norm, rate, **others)
        for name, (norm, rate, others) in KINDS.items()
    }


def matched(found, name, loss: float) -> np.ndarray:
    """[seeds], test accuracy where the training loss first falls below `loss`, between two evaluations; else NaN."""
    values = []
    for train, test in zip(
        claim.array(found[name]["train loss"]), claim.array(found[name]["test accuracy"]), strict=True
    ):
        below = np.flatnonzero(train < loss)
        after = int(below[0]) if len(below) else 0
        if not after:
            values.append(np.nan)
            continue
        share = (np.log(train[after - 1]) - np.log(loss)) / (np.log(train[after - 1]) - np.log(train[after]))
        values.append((1 - share) * test[after - 1] + share * test[after])
    return 100 * np.array(values)


def draw(found, path) -> None:
    figure, axis = plt.subplots(figsize=(10, 6))
    colors = (figures.OTHER, "tab:purple", "tab:brown", figures.OWN, figures.THIRD)
    for (name, values), color in zip(found.items(), colors, strict=True):
        loss, accuracy = (claim.array(values[part]) for part in ("train loss", "test accuracy"))
        for seed in range(len(loss)):
            axis.plot(loss[seed], 100 * accuracy[seed], color=color, alpha=0.25, linewidth=1)
        mean_loss, mean_accuracy = np.exp(np.log(loss).mean(0)), 100 * accuracy.mean(0)
        axis.plot(mean_loss, mean_accuracy, color=color)
        at = int(np.argmin(mean_loss))
        figures.name_line(axis, mean_loss[at], mean_accuracy[at], name, color)
    axis.set(xscale="log", xlabel="training loss (falls to the right)", ylabel="test accuracy, %")
    low, high = axis.get_xlim()
    axis.set_xlim(high, low / 3)
    axis.set_xticks([2, 1, 0.5, 0.2, 0.1], ["2", "1", "0.5", "0.2", "0.1"])
    axis.minorticks_off()
    figure.suptitle("Test accuracy at the same training loss")
    figures.save(figure, path)


def tell(found) -> list[str]:
    header = " | ".join(f"at a training loss of {loss}" for loss in LOSSES)
    lines = [
        f"| test accuracy, % | {header} | best | last, train | last, test |",
        "| --- |" + " --- |" * (len(LOSSES) + 3),
    ]
    for name, values in found.items():
        at = []
        for loss in LOSSES:
            accuracy = matched(found, name, loss)
            at.append(claim.spread(accuracy) if np.isfinite(accuracy).all() else "not reached")
        test, train = (100 * claim.array(values[f"{part} accuracy"]) for part in ("test", "train"))
        ends = (claim.spread(each) for each in (test.max(1), train[:, -1], test[:, -1]))
        lines.append(f"| {name} | {' | '.join([*at, *ends])} |")
    return lines
