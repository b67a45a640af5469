"""Domains mixed in one batch, known for each row, and one that was never seen: clean images and six corruptions."""

import itertools
from functools import partial

import adapting
import claim
import corruptions
import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import sources

import jbn

BATCH = 64
MIXED = {
    "none": "black",
    "own statistics of the mixture": figures.OTHER,
    "one slow state for all": figures.THIRD,
    "a slow state for each": figures.OWN,
    "a state for each, measured before": "tab:purple",
}
UNSEEN = {
    "the source's state": "black",
    "all known states merged": figures.OTHER,
    "the known state that is most certain": figures.THIRD,
    "a slow state of its own": figures.OWN,
}


def by_row(x, params, state, *, activation=None, **_):
    """By the state of each row: state [rows, features]."""
    one = partial(jbn.normalize_running, activation=activation)
    return jax.vmap(one, (0, None, 0))(x, params, state), state


def by_domain(x, params, states, *, domain, activation=None, **_):
    """By the state of its domain [rows], after a step of each of states [domains, features] towards its own rows."""
    masks = domain == jnp.arange(len(states.mean))[:, None]
    measured = jax.vmap(lambda mask: jbn.moments(x, weights=mask))(masks)
    decay = adapting.DECAY ** (jnp.sum(masks, 1) / 64)
    states = jax.vmap(partial(jbn.update, unbiased=False))(states, measured, decay=decay)
    own = jax.tree.map(lambda field: field[domain], states)
    return by_row(x, params, own, activation=activation)[0], states


@partial(jax.jit, static_argnums=0)
def known(apply, params, states, pixels, domain):
    """Logits by states [domains, ...] that stay as they are."""
    own = jax.tree.map(lambda field: field[domain], states)
    return apply(params, own, pixels, by_row)[0]


@partial(jax.jit, static_argnums=0)
def following(apply, params, states, pixels, domain):
    return apply(params, states, pixels, partial(by_domain, domain=domain))


@partial(jax.jit, static_argnums=0)
def most_certain(apply, params, states, pixels):
    """Of the logits by each of states [domains, ...], for each row those of the least entropy."""
    logits = jax.vmap(lambda states: apply(params, states, pixels, adapting.frozen)[0])(states)
    best = jnp.argmin(adapting.entropies(logits), 0)
    return logits[best, jnp.arange(len(pixels))]


def stacked(trees):
    return jax.tree.map(lambda *fields: jnp.stack(fields), *trees)


def jobs(folder, size) -> claim.Jobs:
    def run(name, seed):
        source = sources.NETWORKS[name](folder, seed, size)
        batch = min(BATCH, len(source.labels))
        labels, kinds = source.labels, corruptions.KINDS
        domain = np.random.default_rng(seed).permutation(np.arange(len(labels)) % len(kinds))
        versions = np.stack([corruptions.corrupt(source.pixels, kind, seed) for kind in kinds])
        pixels = versions[domain, np.arange(len(labels))]
        before = source.train_pixels[: len(source.labels)]  # of each domain, without labels
        each = [adapting.adabn(source, corruptions.corrupt(before, kind, seed)) for kind in kinds]
        parts = np.arange(len(labels)).reshape(-1, batch)

        def right(answer):
            """[images] of `answer(rows)`, logits."""
            return np.concatenate([np.argmax(answer(rows), -1) for rows in parts]) == labels

        def by_method(method):
            return adapting.answers(method, source, pixels, batch) == labels

        states = stacked([source.states] * len(kinds))

        def follow(rows):
            nonlocal states
            logits, states = following(source.apply, source.params, states, pixels[rows], domain[rows])
            return logits

        stack = stacked(each)
        mixed = {
            "none": by_method(adapting.NONE),
            "own statistics of the mixture": by_method(adapting.METHODS["own statistics"]),
            "one slow state for all": by_method(adapting.METHODS["slow"]),
            "a slow state for each": right(follow),
            "a state for each, measured before": right(
                lambda rows: known(source.apply, source.params, stack, pixels[rows], domain[rows])
            ),
        }
        found = {method: [hit[domain == place].mean() for place in range(len(kinds))] for method, hit in mixed.items()}
        for place, kind in enumerate(kinds[1:], 1):
            others = [states for other, states in enumerate(each) if other != place]
            merged = stacked([jbn.merge_states(*others)])
            without = stacked(others)
            unseen = {
                "the source's state": mixed["none"],
                "all known states merged": right(
                    lambda rows, merged=merged: known(
                        source.apply, source.params, merged, pixels[rows], np.zeros(batch, np.int32)
                    )
                ),
                "the known state that is most certain": right(
                    lambda rows, without=without: most_certain(source.apply, source.params, without, pixels[rows])
                ),
                "a slow state of its own": mixed["a slow state for each"],
            }
            found[f"unseen {kind}"] = [unseen[method][domain == place].mean() for method in UNSEEN]
        return found

    return {f"{name}, seed {seed}": partial(run, name, seed) for name in sources.NETWORKS for seed in range(size.seeds)}


def of(found, name, method) -> np.ndarray:
    """[seeds, kinds], in percent."""
    rows = [row for job, row in found.items() if job.startswith(f"{name}, ")]
    if method in MIXED:
        return 100 * np.array([claim.array(row[method]) for row in rows])
    place = list(UNSEEN).index(method)
    return 100 * np.array(
        [[claim.array(row[f"unseen {kind}"])[place] for kind in corruptions.STRENGTHS] for row in rows]
    )


def draw(found, path) -> None:
    figure, axes = plt.subplots(len(sources.NETWORKS), 2, figsize=(16, 10), sharey="row")
    for row, name in zip(axes, sources.NETWORKS, strict=True):
        for axis, methods, kinds in zip(row, (MIXED, UNSEEN), (corruptions.KINDS, corruptions.STRENGTHS), strict=True):
            kinds = list(kinds)
            width = 0.8 / len(methods)
            for index, (method, color) in enumerate(methods.items()):
                values = of(found, name, method)
                at = np.arange(len(kinds)) + width * (index - len(methods) / 2 + 0.5)
                axis.bar(at, np.mean(values, 0), width, color=color, label=method)
                axis.vlines(at, values.min(0), values.max(0), color="gray", linewidth=1)
            axis.set_xticks(np.arange(len(kinds)), kinds)
            axis.grid(axis="x", visible=False)
            axis.set(
                title=f"{name}: " + ("all mixed in each batch" if methods is MIXED else "a corruption not seen before")
            )
        row[0].set_ylabel("accuracy, %")
    for axis in axes[-1]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    figure.suptitle(f"Domains mixed in batches of {BATCH}: a state for each, rather than one for all")
    figures.save(figure, path)


def tell(found) -> list[str]:
    lines = []
    parts = (("all mixed", corruptions.KINDS, MIXED), ("not seen before", corruptions.STRENGTHS, UNSEEN))
    for name, (part, kinds, methods) in itertools.product(sources.NETWORKS, parts):
        lines += [f"| {name}, {part}, % | mean | {' | '.join(kinds)} |", "| --- |" + " --- |" * (len(kinds) + 1)]
        for method in methods:
            values = of(found, name, method)
            cells = [claim.spread(np.mean(values, 1)), *(f"{mean:.0f}" for mean in np.mean(values, 0))]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]
