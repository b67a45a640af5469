"""Folded kernels beside those that PyTorch makes."""

import jax.numpy as jnp
import numpy as np
import pytest

import jbn

torch = pytest.importorskip("torch")
FEATURES = 6
LAYERS = {  # output_axis of the kernel in PyTorch's layout
    "convolution": (torch.nn.Conv2d(4, FEATURES, 3, padding=1), 0, False),
    "depthwise": (torch.nn.Conv2d(3, FEATURES, 3, groups=3, bias=False), 0, False),
    "transposed": (torch.nn.ConvTranspose2d(4, FEATURES, 3), 1, True),
    "linear": (torch.nn.Linear(4, FEATURES), 0, None),
}


@pytest.mark.parametrize(
    ("name", "affine"), [(name, affine) for name in LAYERS for affine in (True, False) if affine or name != "linear"]
)
def test_fused(name, affine):
    """PyTorch cannot fuse a linear layer with a norm without scale and bias."""
    layer, output_axis, transpose = LAYERS[name]
    norm = (torch.nn.BatchNorm1d if transpose is None else torch.nn.BatchNorm2d)(FEATURES, eps=1e-3, affine=affine)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (norm.running_mean, *norm.parameters()):
            tensor.copy_(torch.randn(FEATURES, generator=generator))
        norm.running_var.copy_(torch.rand(FEATURES, generator=generator) + 0.1)
    layer, norm = layer.eval(), norm.eval()
    fused = (
        torch.nn.utils.fuse_linear_bn_eval(layer, norm)
        if transpose is None
        else torch.nn.utils.fuse_conv_bn_eval(layer, norm, transpose)
    )
    arrays = {name: jnp.array(tensor.detach().numpy()) for name, tensor in norm.state_dict().items()}
    params = jbn.Params(arrays.get("weight"), arrays.get("bias"))
    state = jbn.State(arrays["running_mean"], arrays["running_var"])
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    kernel, bias = jbn.fold_into(
        layer.weight.detach().numpy(), bias, params, state, epsilon=1e-3, output_axis=output_axis
    )
    np.testing.assert_allclose(kernel, fused.weight.detach().numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(bias, fused.bias.detach().numpy(), rtol=1e-5, atol=1e-6)
