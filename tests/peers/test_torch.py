"""Parity with PyTorch: decay = 1 - momentum, the unbiased variance runs, and the state starts with full weight."""

from functools import partial

import numpy as np
import parity
import pytest
from test_layers import every_layer

torch = pytest.importorskip("torch")


def torch_steps(data, layer):
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(parity.SCALE))
        layer.bias.copy_(torch.from_numpy(parity.BIAS))
    for x, dy in data:
        x = torch.from_numpy(x).requires_grad_()
        layer.zero_grad()
        y = layer.train()(x)
        y.backward(torch.from_numpy(dy))
        evaluation = layer.eval()(x)
        fields = (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, evaluation)
        yield parity.Step(*(field.detach().numpy().copy() for field in fields))


LAYERS = {
    "1d": (torch.nn.BatchNorm1d, (16, 3)),
    "1d with length": (torch.nn.BatchNorm1d, (4, 3, 7)),
    "2d": (torch.nn.BatchNorm2d, (4, 3, 5, 6)),
    "3d": (torch.nn.BatchNorm3d, (2, 3, 4, 3, 2)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("momentum", "epsilon"), [(0.1, 1e-5), (0.01, 1e-3)])
def test_features_second(layer, shape, momentum, epsilon):
    data = parity.batches(shape)
    theirs = list(torch_steps(data, layer(3, eps=epsilon, momentum=momentum)))
    ours = parity.jbn_steps(data, debias=False, epsilon=epsilon, decay=1 - momentum, feature_axis=1)
    parity.assert_parity(theirs, ours)


def test_features_last():
    data = parity.batches((4, 5, 6, 3))
    first = [tuple(np.ascontiguousarray(np.moveaxis(a, -1, 1)) for a in pair) for pair in data]
    theirs = torch_steps(first, torch.nn.BatchNorm2d(3))
    large = ("output", "input_gradient", "evaluation")
    theirs = [step._replace(**{field: np.moveaxis(getattr(step, field), 1, -1) for field in large}) for step in theirs]
    parity.assert_parity(theirs, parity.jbn_steps(data, debias=False, epsilon=1e-5, decay=0.9))


def test_momentum_none_is_a_decay_that_counts():
    """PyTorch's cumulative average: the decay of step t, from 0, is t / (t + 1)."""
    data = parity.batches((4, 3, 5, 6))
    theirs = list(torch_steps(data, torch.nn.BatchNorm2d(3, momentum=None)))
    decay = [step / (step + 1) for step in range(len(data))]
    parity.assert_parity(theirs, parity.jbn_steps(data, debias=False, epsilon=1e-5, decay=decay, feature_axis=1))


def test_one_value_is_refused_by_both():
    x = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="more than 1 value"):
        torch.nn.BatchNorm1d(3)(torch.from_numpy(x))
    with pytest.raises(ValueError, match="one value per feature"):
        parity.jbn_steps([(x, x)], debias=False, epsilon=1e-5, decay=0.9)


@every_layer
def test_layers_with_unbiased_keep_what_torch_keeps(layer):
    """Of 8 rows the two variances are 14 % apart."""
    x, theirs = np.random.default_rng(0).normal(2, 3, (20, 8, 3)).astype(np.float32), torch.nn.BatchNorm1d(3)
    for batch in x:
        theirs(torch.from_numpy(batch))
    left = 0 if layer.flax else 0.9**20  # of the initial mean 0 and variance 1, where a layer debiases
    mean, var = theirs.running_mean.numpy() / (1 - left), (theirs.running_var.numpy() - left) / (1 - left)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums of 8 values near 10, 20 times
    for unbiased in (True, False):
        apply, variables = layer.alone(x[0], unbiased=unbiased)
        for batch in x:
            _, variables = apply(variables, batch)
        state = layer.state(variables)
        close(state.mean, mean)
        kept = 0.9**20 - left
        close(state.var - kept, (var - kept) * (1 if unbiased else 7 / 8))
