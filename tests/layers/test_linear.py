import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psf.layers import linear as linear_layers
from psf.layers.linear import ConvolutionalLinear, multiply_by_convolutions


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (2, 1, 3), (2, 0, 3), (2, 4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_the_linear_layer(shape, bias, monkeypatch):
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    linear = nn.Linear(3, 4, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 4)
    leaves = [x, *linear.parameters()]
    expected = linear(x)
    torch.testing.assert_close(ConvolutionalLinear(linear)(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(ConvolutionalLinear(linear)(x), leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
    )
    columns = torch.randn(3, 6).t()  # not contiguous
    torch.testing.assert_close(ConvolutionalLinear(linear)(columns), linear(columns))


@pytest.mark.parametrize(
    ("rows", "dtype", "autocast", "pays"),
    [
        (linear_layers.LEAST_ROWS, torch.float32, False, True),
        (linear_layers.LEAST_ROWS - 1, torch.float32, False, False),
        (linear_layers.LEAST_ROWS, torch.bfloat16, False, False),
        (linear_layers.LEAST_ROWS, torch.float32, True, False),
    ],
)
def test_only_large_products_in_single_precision(rows, dtype, autocast, pays, monkeypatch):
    called = []
    monkeypatch.setattr(
        F, "conv2d", lambda *args: called.append(args) or torch.zeros(1, 4, 1, rows)
    )
    layer = ConvolutionalLinear(nn.Linear(3, 4).to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(torch.zeros(rows, 3, dtype=dtype))
    assert bool(called) == pays


def test_weights_and_their_names_stay():
    least = linear_layers.LEAST_CHANNELS
    model = nn.Sequential(nn.Linear(least, least), nn.Linear(least, least - 1))
    before = model.state_dict()
    multiply_by_convolutions(model)
    assert [type(layer) for layer in model] == [ConvolutionalLinear, nn.Linear]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
