"""The networks of docs/layers.md, each with jbn's layer and with its framework's own: how far apart ten steps are.

    python benchmarks/layers.py         prints the table of that page

The code is that of the page. With the framework's own layer it is the same but for the import.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "layers.md"
RATE, DECAY = 0.1, 0.9


class Step(NamedTuple):
    """One step of training, and the evaluation of the same batch after it."""

    outputs: Any
    gradients: Any
    mean: Any
    var: Any
    evaluation: Any


def sections() -> dict[str, list[str]]:
    """Heading and blocks of code of the page's sections; what all start with is under ""."""
    title, *rest = PAGE.read_text().split("\n## ")
    texts = {"": title} | {text.splitlines()[0]: text for text in rest}
    return {heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, text in texts.items()}


def code(heading: str, *, own: bool) -> tuple[str, str]:
    """The layer, or its import, and the network of a section; `own`: with the layer of the framework."""
    blocks = sections()[heading]
    network = next(block for block in blocks if "class BatchNorm" not in block)
    theirs, ours = IMPORTS[heading]
    layer = next((block for block in blocks if "class BatchNorm" in block), "")
    if not layer:
        (layer,) = (line + "\n" for line in network.splitlines() if line == ours)
        network = network.replace(layer, "")
    return (theirs + "\n" if own else layer), network


def define(heading: str, *, own: bool) -> dict[str, Any]:
    """What the code of a section defines, up to its network."""
    found: dict[str, Any] = {}
    for block in (*sections()[""], *code(heading, own=own)):
        exec(block, found)
    return found


def descend(found, params, state, gradient, evaluate, running) -> Iterator[Step]:
    """Gradient descent; gradient(params, state, x, target) gives (loss, (y, state)) and gradients."""
    for number, (x, target) in enumerate(zip(found["batches"], found["targets"], strict=True), 1):
        (_, (y, state)), gradients = gradient(params, state, x, target)
        params = jax.tree.map(lambda param, slope: param - RATE * slope, params, gradients)
        mean, var = running(state, number)
        yield Step(y, jax.tree.leaves(gradients), mean, var, evaluate(params, state, x))


def by_functions(running) -> Callable[[dict[str, Any]], Iterator[Step]]:
    def steps(found):
        return descend(found, found["params"], found["state"], found["gradient"], found["evaluate"], running)

    return steps


def with_nnx(found) -> Iterator[Step]:
    from flax import nnx

    graph, params, state = nnx.split(found["model"], nnx.Param, ...)

    def gradient(params, state, x, target):
        model = nnx.merge(graph, params, state, copy=True)
        (loss, y), gradients = found["gradient"](model, x, target)
        return (loss, (y, nnx.split(model, nnx.Param, ...)[2])), gradients

    def evaluate(params, state, x):
        model = nnx.merge(graph, params, state, copy=True)
        model.eval()
        return model(x)

    def running(state, _):
        return state["norm"]["mean"][...], state["norm"]["var"][...]

    return descend(found, params, state, gradient, evaluate, running)


def with_equinox(found) -> Iterator[Step]:
    import equinox as eqx

    arrays, others = eqx.partition(found["model"], eqx.is_array)
    index = found["model"][1]

    def gradient(arrays, state, x, target):
        return found["gradient"](eqx.combine(arrays, others), state, x, target)

    def evaluate(arrays, state, x):
        return found["evaluate"](eqx.combine(arrays, others), state, x)

    def running(state, number):
        if hasattr(index, "state_index"):
            return state.get(index.state_index)[:2]
        hidden_mean, hidden_var = state.get(index.batch_state_index)  # debiased by hand
        return hidden_mean / (1 - DECAY**number), (hidden_var - DECAY**number) / (1 - DECAY**number)

    return descend(found, arrays, found["state"], gradient, evaluate, running)


def with_keras(found) -> Iterator[Step]:
    model = found["model"]
    params, state = ([each.value for each in of] for of in (model.trainable_variables, model.non_trainable_variables))

    @jax.jit
    def gradient(params, state, x, target):
        def loss(params):
            y, after = model.stateless_call(params, state, x, training=True)
            return jnp.mean((y - target) ** 2), (y, after)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def evaluate(params, state, x):
        return model.stateless_call(params, state, x, training=False)[0]

    return descend(found, params, state, gradient, evaluate, lambda state, _: state[:2])


def of_linen(state, _):
    return state["BatchNorm_0"]["mean"], state["BatchNorm_0"]["var"]


def of_haiku(state, _):
    if "batch_norm" in state:
        return state["batch_norm"]["state"][:2]
    return tuple(jnp.ravel(state[f"batch_norm/~/{name}_ema"]["average"]) for name in ("mean", "var"))


STEPS = {
    "Flax linen": by_functions(of_linen),
    "Flax nnx": with_nnx,
    "Equinox": with_equinox,
    "Haiku": by_functions(of_haiku),
    "Keras": with_keras,
}
IMPORTS = {
    "Flax linen": ("from flax.linen import BatchNorm", "from jbn.linen import BatchNorm"),
    "Flax nnx": ("from flax.nnx import BatchNorm", "from jbn.nnx import BatchNorm"),
    "Equinox": ("from equinox.nn import BatchNorm", "from jbn.equinox import BatchNorm"),
    "Haiku": ("from haiku import BatchNorm", ""),
    "Keras": ("from keras.layers import BatchNormalization as BatchNorm", ""),
}


def differences(heading: str) -> Step:
    """The largest difference of each field, over all steps."""
    ours, theirs = (list(STEPS[heading](define(heading, own=own))) for own in (False, True))
    assert len(ours) == 10

    def largest(field):
        a, b = (jax.tree.leaves([step[field] for step in steps]) for steps in (ours, theirs))
        return max(float(np.abs(np.asarray(one) - np.asarray(two)).max()) for one, two in zip(a, b, strict=True))

    return Step(*map(largest, range(len(Step._fields))))


def lines(heading: str, *, own: bool) -> int:
    """How many lines of code the layer and the network are, blank ones left out."""
    return sum(bool(line.strip()) for block in code(heading, own=own) for line in block.splitlines())


def rows() -> Iterator[str]:
    """The table of the page."""
    yield f"| | {' | '.join(Step._fields)} | lines before | after |"
    yield f"| --- |{' --- |' * 7}"
    for heading in STEPS:
        cells = [f"{value:.0e}" for value in differences(heading)]
        yield f"| {' | '.join([heading, *cells, *(str(lines(heading, own=own)) for own in (True, False))])} |"


if __name__ == "__main__":
    print("\n".join(rows()))
