"""jbn's layers in their frameworks, each a row of LAYERS, and what a promise needs of any of them.

A model is two times, or in `stack` three times in one scan: a linear map, a normalization, relu.
"""

from functools import cache, partial
from types import MappingProxyType

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization

import jbn
import jbn.equinox
import jbn.linen
import jbn.nnx

MOMENTUM, IN, FEATURES = 0.9, 4, 3
RNG = np.random.default_rng(0)
BATCHES = RNG.normal(1, 2, (10, 16, IN)).astype(np.float32)
TARGETS = RNG.normal(size=(10, 16, FEATURES)).astype(np.float32)
X = RNG.normal(2, 3, (4, 5, 6, FEATURES)).astype(np.float32)
ROWS = X.reshape(-1, FEATURES)
KEY = jax.random.key(0)
by_norm = partial(zip, ("norm_a", "norm_b"))


class Layer:
    """How one framework does it; `debias` and other options are those of its layer."""

    flax = True  # its own layer starts with full evidence, and reads what jbn's has written
    axes = (-1,)  # where it takes the features to be
    float64 = MappingProxyType({"param_dtype": jnp.float64})
    check_vma = True

    def __init__(self, layer, **options):
        self.ours = partial(layer, momentum=MOMENTUM, **options)
        self.name = f"{layer.__module__.removeprefix('jbn.')}.{layer.__name__}"

    @cache  # noqa: B019 one and the same, for `jit`
    def kind(self, own=False, **options):
        """The constructor of jbn's layer, or of the framework's own."""
        return partial(self.own if own else self.ours, **options)

    def first(self, x, mask=None, **options):
        """(y, state) of one step of a layer by itself."""
        apply, variables = self.alone(x, **options)
        y, variables = apply(variables, x, mask)
        return y, self.state(variables)

    def train(self, model, steps):
        for index in steps:
            model, _ = self.step(model, BATCHES[index], TARGETS[index])
        return model


class LinenBlock(nn.Module):
    norm: partial

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(self.norm(use_running_average=not train)(nn.Dense(FEATURES)(x))), None


class LinenStack(nn.Module):
    norm: partial

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0, "moments": 0}
        options = {"variable_axes": axes, "split_rngs": {"params": True}, "in_axes": nn.broadcast, "length": 3}
        return nn.scan(LinenBlock, **options)(self.norm, name="blocks")(x, train)[0]


class LinenNetwork(nn.Module):
    norm: partial

    @nn.compact
    def __call__(self, x, train):
        for name in "ab":
            x = nn.Dense(FEATURES, name=name)(x)
            x = nn.relu(self.norm(use_running_average=not train, name=f"norm_{name}")(x))
        return x


@partial(jax.jit, static_argnums=0)
def linen_step(network, variables, x, target):
    def loss(params):
        y, changed = network.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2), changed

    (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients), **changed}, value


class Linen(Layer):
    """A model is a network and its variables."""

    own = staticmethod(partial(nn.BatchNorm, momentum=MOMENTUM, use_fast_variance=False))
    axes = (-1, 1, -2, (1, -1), (-1, 1), (3, -1))
    hands = ("variables", "half a checkpoint")

    def alone(self, x, **options):
        layer = self.kind(**options)(use_running_average=False)

        def apply(variables, x, mask=None):
            y, changed = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            states = jbn.linen.states(changed["batch_stats"])
            return y, variables | {"batch_stats": jbn.linen.batch_stats(states, like=changed["batch_stats"])}

        return apply, layer.init(KEY, x)

    def state(self, variables):
        return jbn.linen.states(variables["batch_stats"])

    def network(self, own=False, **options):
        network = LinenNetwork(self.kind(own, **options))
        return network, network.init(KEY, BATCHES[0], True)

    def step(self, model, x, target, remat=False):
        network, variables = model
        wrapped = nn.remat(LinenNetwork, static_argnums=2)(network.norm) if remat else network
        variables, loss = linen_step(wrapped, variables, x, target)
        return (network, variables), loss

    def evaluate(self, model, x):
        network, variables = model
        return network.apply(variables, x, False)

    def params(self, model):
        given = model[1]["params"]
        return [
            (*map(given[a].get, ("kernel", "bias")), *map(given[n].get, ("scale", "bias"))) for n, a in by_norm("ab")
        ]

    def states(self, model):
        return jbn.linen.states(model[1]["batch_stats"])

    def read(self, model, written):
        return model[0], serialization.from_bytes(model[1], serialization.to_bytes(written[1]))

    def hand(self, model, given, how="variables"):
        (network, own), (_, variables) = model, given
        if how == "half a checkpoint":  # the weight is still that of the start
            kept, new = own["batch_stats"], variables["batch_stats"]
            variables = variables | {"batch_stats": {name: kept[name] | new[name] for name in new}}
        return network, variables

    def stack(self, **options):
        network = LinenStack(self.kind(**options))
        return network, network.init(KEY, ROWS, True)

    def of_stack(self, model):
        linear = model[1]["params"]["blocks"]["Dense_0"]
        return zip(linear["kernel"], linear["bias"], strict=True)

    def recalibration(self, model):
        """As in the docstring of the module."""
        network, variables = model

        def apply(params, states, batch):
            given = {"params": params, "batch_stats": jbn.linen.batch_stats(states)}
            y, changed = network.apply(given, batch, True, mutable=["batch_stats"])
            assert "moments" not in changed
            return y, jbn.linen.states(changed["batch_stats"])

        return apply, variables["params"], jbn.linen.states(variables["batch_stats"])

    def with_states(self, model, states):
        network, variables = model
        return network, variables | {"batch_stats": jbn.linen.batch_stats(states, like=variables["batch_stats"])}


class NnxNetwork(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(IN, FEATURES, rngs=rngs), nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.norm_a, self.norm_b = norm(FEATURES, rngs=rngs), norm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm_b(self.b(nnx.relu(self.norm_a(self.a(x))))))


class NnxBlock(nnx.Module):
    def __init__(self, norm, rngs):
        self.linear, self.norm = nnx.Linear(FEATURES, FEATURES, rngs=rngs), norm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


class NnxStack(nnx.Module):
    def __init__(self, norm):
        stacked = nnx.vmap(NnxBlock, in_axes=(None, 0))
        self.blocks = nnx.split_rngs(splits=3)(lambda rngs: stacked(norm, rngs))(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


@cache
def nnx_step(graph, remat):
    @nnx.jit(graph=graph, graph_updates=graph)
    def step(model, x, target):
        def loss(model):
            of = nnx.remat(lambda model, x: model(x)) if remat else lambda model, x: model(x)
            return jnp.mean((of(model, x) - target) ** 2)

        value, gradients = nnx.value_and_grad(loss, graph=graph, graph_updates=graph)(model)
        gradients = gradients if graph else nnx.state(gradients, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradients))
        return value

    return step


def values(node):
    """The state of a module, without the kinds of its variables."""
    return nnx.to_pure_dict(node if isinstance(node, nnx.State) else nnx.state(node))


class Nnx(Layer):
    """A model is a module, which steps move in place."""

    own = staticmethod(partial(nnx.BatchNorm, momentum=MOMENTUM, use_fast_variance=False))
    axes = (-1, 1, -2, 0)
    float64 = None  # its statistics are float32
    hands = ("state", "dict", "half a checkpoint")

    def __init__(self, layer, graph=True, **options):
        super().__init__(layer, **options)
        self.graph, self.name = graph, self.name + "" if graph else f"{self.name} as a tree"

    def alone(self, x, axis=-1, **options):
        def apply(variables, x, mask=None):
            layer = nnx.merge(*variables, copy=True)
            y = layer(x, mask=mask)
            jbn.nnx.set_states(layer, jbn.nnx.states(layer))
            return y, nnx.split(layer)

        return apply, nnx.split(self.kind(axis=axis, **options)(x.shape[axis], rngs=nnx.Rngs(0)))

    def state(self, variables):
        return jbn.nnx.states(nnx.merge(*variables))[""]

    def network(self, own=False, **options):
        return NnxNetwork(self.kind(own, **options))

    def step(self, model, x, target, remat=False):
        model.train()
        loss = nnx_step(self.graph, remat)(model, x, target)
        return model, loss

    def evaluate(self, model, x):
        return nnx.view(model, use_running_average=True)(x)

    def params(self, model):
        pairs = (model.a, model.norm_a), (model.b, model.norm_b)
        return [(m.kernel[...], m.bias[...], n.scale[...], n.bias[...]) for m, n in pairs]

    def states(self, model):
        own = {name: (norm.mean[...], norm.var[...]) for name, norm in by_norm((model.norm_a, model.norm_b))}
        return jbn.nnx.states(model) or {name: jbn.State(*each, jnp.ones_like(each[0])) for name, each in own.items()}

    def read(self, model, written):
        return self.hand(model, written)

    def hand(self, model, given, how="state"):
        state = jax.tree.map(jnp.array, nnx.state(given))
        if how == "half a checkpoint":  # restored into the state of this model, as far as it goes
            given, state = state, nnx.state(model)
            nnx.replace_by_pure_dict(state, nnx.to_pure_dict(given))
        nnx.update(model, values(state) if how == "dict" else state)
        return model

    def stack(self, **options):
        return NnxStack(self.kind(**options))

    def of_stack(self, model):
        return zip(model.blocks.linear.kernel[...], model.blocks.linear.bias[...], strict=True)

    def recalibration(self, model):
        """As in the docstring of the module."""

        def apply(model, states, batch):
            jbn.nnx.set_states(model, states)
            return model(batch), jbn.nnx.states(model)

        model.train()
        return apply, model, jbn.nnx.states(model)

    def with_states(self, model, states):
        jbn.nnx.set_states(model, states)
        return model


def over_batch(model, state, x, weights=None):
    def one(x, state, weights):
        return model(x, state) if weights is None else model(x, state, weights=weights)

    return jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(x, state, weights)


@eqx.filter_jit
def equinox_step(remat, model, state, x, target):
    @partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(model):
        y, new = (eqx.filter_checkpoint(over_batch) if remat else over_batch)(model, state, x)
        return jnp.mean((y - target) ** 2), new

    (value, state), gradients = loss(model)
    return eqx.apply_updates(model, jax.tree.map(lambda each: -0.1 * each, gradients)), state, value


class EquinoxStack(eqx.Module):
    blocks: eqx.nn.Sequential

    def __call__(self, x, state):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        through = lambda x, block: eqx.combine(block[0], static)(x, block[1])  # noqa: E731
        return jax.lax.scan(through, x, (arrays, state))


class Equinox(Layer):
    """A model is a module and its `eqx.nn.State`. Equinox hides averages that jbn has debiased."""

    flax, float64, check_vma = (
        False,
        MappingProxyType({}),
        False,
    )  # JAX has no collective over an axis of vmap with check_vma
    own = staticmethod(partial(eqx.nn.BatchNorm, momentum=MOMENTUM, mode="batch"))

    def alone(self, x, axis_name=(), **options):
        layer, state = eqx.nn.make_with_state(self.kind(**options))(x.shape[-1], (*axis_name, "batch"))

        def apply(state, x, mask=None):
            if mask is not None:
                mask = jnp.broadcast_to(mask, (*x.shape[:-1], mask.shape[-1]))
                mask = jnp.moveaxis(mask, -1, 1) if mask.shape[-1] > 1 else mask[..., 0]
            y, state = over_batch(layer, state, jnp.moveaxis(x, -1, 1), mask)
            return jnp.moveaxis(y, 1, -1), state

        return apply, state

    def state(self, variables):
        (found,) = states_in(variables)
        return found

    def network(self, own=False, **options):
        def make(key):
            norm, keys = partial(self.kind(own, **options), axis_name="batch"), jax.random.split(key)
            layers = [
                (eqx.nn.Linear(size, FEATURES, key=key), norm(FEATURES), eqx.nn.Lambda(jax.nn.relu))
                for size, key in zip((IN, FEATURES), keys, strict=True)
            ]
            return eqx.nn.Sequential(sum(layers, ()))

        return eqx.nn.make_with_state(make)(KEY)

    def step(self, model, x, target, remat=False):
        *model, loss = equinox_step(remat, *model, x, target)
        return model, loss

    def evaluate(self, model, x):
        network, state = model
        return over_batch(eqx.nn.inference_mode(network), state, x)[0]

    def params(self, model):
        network, _ = model
        pairs = [network[at : at + 2] for at in (0, 3)]
        return [(linear.weight.T, linear.bias, norm.weight, norm.bias) for linear, norm in pairs]

    def states(self, model):
        network, state = model
        return {name: self.of(norm, state) for name, norm in by_norm((network[1], network[4]))}

    def of(self, norm, state):
        if isinstance(norm, jbn.equinox.BatchNorm):
            return state.get(norm.state_index)
        weight = 1 - MOMENTUM ** np.float64(state.get(norm.batch_counter))  # it starts from mean 0 and variance 1
        mean, var = (np.float64(each) for each in state.get(norm.batch_state_index))
        return jbn.State(mean / weight, (var - 1 + weight) / weight, np.full(mean.shape, weight))

    def stack(self, **options):
        def block(key):
            norm = self.kind(**options)(FEATURES, axis_name="batch")
            return eqx.nn.Sequential([eqx.nn.Linear(FEATURES, FEATURES, key=key), norm, eqx.nn.Lambda(jax.nn.relu)])

        blocks, state = eqx.filter_vmap(eqx.nn.make_with_state(block))(jax.random.split(KEY, 3))
        return EquinoxStack(blocks), state

    def of_stack(self, model):
        linear = model[0].blocks[0]
        return zip(jnp.moveaxis(linear.weight, -1, -2), linear.bias, strict=True)

    def recalibration(self, model):
        """An Equinox model holds functions, which are no arguments of `jit`."""
        arrays, static = eqx.partition(model[0], eqx.is_array)
        return lambda arrays, state, x: over_batch(eqx.combine(arrays, static), state, x), arrays, model[1]

    def with_states(self, model, states):
        return model[0], states


def states_in(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_state) if is_state(leaf)]


def is_state(value):
    return isinstance(value, jbn.State)


LAYERS = (Linen(jbn.linen.BatchNorm), Nnx(jbn.nnx.BatchNorm), Equinox(jbn.equinox.BatchNorm))
FLAX = [layer for layer in LAYERS if layer.flax]
