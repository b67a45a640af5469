"""Parity of `recalibrate` with PyTorch's `update_bn`, which averages what each batch gives."""

import jax.numpy as jnp
import numpy as np
import torch

import jbn

BATCHES, ROWS, WIDTHS = 4, 16, (3, 8, 5)
DATA = np.random.default_rng(0).normal(1, 2, (BATCHES, ROWS, WIDTHS[0])).astype(np.float32)
DATA += np.arange(BATCHES, dtype=np.float32)[:, None, None]  # the batches differ


def theirs(batches):
    """Kernels of two linear layers, and means and variances of the normalizations after each."""
    torch.manual_seed(0)
    linear = [torch.nn.Linear(*WIDTHS[index : index + 2], bias=False) for index in range(2)]
    norms = [torch.nn.BatchNorm1d(width) for width in WIDTHS[1:]]
    model = torch.nn.Sequential(linear[0], norms[0], torch.nn.Tanh(), linear[1], norms[1])
    torch.optim.swa_utils.update_bn([torch.from_numpy(batch) for batch in batches], model)
    kernels = [layer.weight.detach().numpy().T for layer in linear]
    return kernels, [(norm.running_mean.numpy(), norm.running_var.numpy()) for norm in norms]


def apply(kernels, states, x):
    after = []
    for kernel, state in zip(kernels, states, strict=True):
        x, state = jbn.batch_norm(x @ kernel, jbn.Params(None, None), state, train=True)
        x, after = jnp.tanh(x), [*after, state]
    return x, after


def test_one_batch_is_the_same():
    whole = DATA.reshape(1, -1, WIDTHS[0])
    kernels, found = theirs(whole)
    states = jbn.recalibrate(apply, kernels, [jbn.init(width)[1] for width in WIDTHS[1:]], whole, passes=1)
    for state, (mean, var) in zip(states, found, strict=True):
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)  # float32
        np.testing.assert_allclose(state.var, var, rtol=1e-5)


def test_of_several_batches_the_means_are_the_same_and_the_variance_between_them_is_not_lost():
    kernels, found = theirs(DATA)
    states = jbn.recalibrate(apply, kernels, [jbn.init(width)[1] for width in WIDTHS[1:]], DATA, passes=1)
    for state, (mean, _) in zip(states, found, strict=True):
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)
    first = np.float64(DATA) @ kernels[0]
    np.testing.assert_allclose(found[0][1], first.var(1, ddof=1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(states[0].var, first.reshape(-1, WIDTHS[1]).var(0, ddof=1), rtol=1e-5)
