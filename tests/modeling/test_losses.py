import math

import pytest
import torch
from torch.nn import functional as F

from psf.layers.ms_deform_attn import has_extension
from psf.modeling import losses
from psf.modeling.losses import (
    dice_cost,
    dice_loss,
    focal_cost,
    shrink_masks,
    sigmoid_focal_loss,
    upsampled_dice_loss,
)
from psf.modeling.postprocessing import as_they_are

needs_extension = pytest.mark.skipif(not has_extension(), reason="psf._C is not in use")


def test_nothing_to_lose():
    assert dice_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)
    assert focal_cost(torch.zeros(2, 3, 5), torch.zeros(0, dtype=torch.int64)).shape == (2, 3, 0)


def test_focal_loss_by_hand():
    """
    p = 0.5: positive 0.25 * 0.5^2 * ln 2, negative 0.75 * 0.5^2 * ln 2.

    p = 0.8 (logit ln 4), positive: 0.25 * 0.2^2 * -ln 0.8.
    """
    logits = torch.tensor([0.0, 0.0, math.log(4)])
    expected = [0.0625 * math.log(2), 0.1875 * math.log(2), 0.01 * -math.log(0.8)]
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, torch.tensor([1.0, 0.0, 1.0])), torch.tensor(expected)
    )


def _focal_loss_by_autograd(logits, targets):
    probability = logits.sigmoid()
    miss = targets * (1 - probability) + (1 - targets) * probability
    alpha = targets * losses.FOCAL_ALPHA + (1 - targets) * (1 - losses.FOCAL_ALPHA)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return alpha * miss**losses.FOCAL_GAMMA * entropy


def test_focal_loss_and_gradient_are_autograds():
    torch.manual_seed(0)
    logits = (10 * torch.randn(2, 50, 3, dtype=torch.float64)).requires_grad_()
    targets = (torch.rand(50, 3) > 0.5).double()  # shared by the first dimension
    found = sigmoid_focal_loss(logits, targets)
    expected = _focal_loss_by_autograd(logits, targets.expand_as(logits))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(loss.square().sum(), logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets[:5]), logits[:, :5])


def test_focal_loss_of_extreme_logits_is_finite():
    """Wrong by 1000: 0.75 * 1000 and 0.25 * 1000, of slope 0.75 and -0.25; right: nothing."""
    logits = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([750.0, 250.0, 0.0, 0.0]))
    torch.testing.assert_close(logits.grad, torch.tensor([0.75, -0.25, 0.0, 0.0]))


def test_focal_cost_is_the_change_of_the_loss():
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([2, 0, 2])
    cost = focal_cost(logits, labels)
    for q in range(6):
        for g, label in enumerate(labels):
            off, on = torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
            on[q, label] = 1
            change = sigmoid_focal_loss(logits, on).sum() - sigmoid_focal_loss(logits, off).sum()
            torch.testing.assert_close(cost[q, g], change)


def test_dice_loss_by_hand():
    """Two of four pixels predicted, one right: 1 - 2 * 1 / (2 + 1); the same mask 0; disjoint 1."""
    prediction = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]] * 3)
    target = torch.tensor([[[1.0, 0], [0, 0]], [[1, 1], [0, 0]], [[0, 0], [1, 1]]])
    torch.testing.assert_close(
        dice_loss(prediction, target), torch.tensor([1 / 3, 0.0, 1.0]), atol=1e-5, rtol=0
    )


def test_dice_loss_of_empty_masks_is_finite_with_gradient():
    prediction = torch.zeros(1, 2, 2, requires_grad=True)
    loss = dice_loss(prediction, torch.zeros(1, 2, 2))
    loss.sum().backward()
    assert loss.item() == 1
    assert prediction.grad.isfinite().all()


def test_dice_cost_is_the_dice_loss_of_every_pair():
    masks, targets = torch.rand(3, 4, 5) * 2, (torch.rand(2, 4, 5) > 0.5).float()
    cost = dice_cost(masks, targets, eps=1e-6)
    assert cost.shape == (3, 2)
    for q in range(3):
        for g in range(2):
            expected = dice_loss(masks[q : q + 1], targets[g : g + 1])[0]
            torch.testing.assert_close(cost[q, g], expected)


def test_dice_cost_of_nothing():
    assert dice_cost(torch.zeros(0, 4, 5), torch.zeros(0, 4, 5)).shape == (0, 0)
    assert dice_cost(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 1


ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "none": as_they_are}


@pytest.mark.parametrize("chunk", [losses.CHUNK_SIZE, 200])  # all at once, one segment
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("layers", "num_segments"), [(2, 0), (1, 1), (3, 5)])
def test_upsampled_dice_loss_is_the_dice_loss_of_upsampled_masks(
    monkeypatch, layers, num_segments, activation, chunk
):
    monkeypatch.setattr(losses, "CHUNK_SIZE", chunk)
    torch.manual_seed(0)
    activate = ACTIVATIONS[activation]
    maps = torch.randn(layers, num_segments, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(num_segments, 8, 9, dtype=torch.float64)
    found = upsampled_dice_loss(maps, targets, activate)
    masks = F.interpolate(maps, size=(8, 9), mode="bilinear") if num_segments else None
    expected = maps.sum((2, 3))
    if masks is not None:
        expected = torch.stack([dice_loss(activate(layer), targets) for layer in masks])
    torch.testing.assert_close(found, expected)
    weights = torch.rand_like(found)
    (grad,), (expected_grad,) = (
        torch.autograd.grad((loss * weights).sum(), maps) for loss in (found, expected)
    )
    torch.testing.assert_close(grad, expected_grad)


def test_upsampled_dice_loss_stores_nothing_of_the_masks_size():
    maps, targets = torch.randn(3, 2, 4, 4, requires_grad=True), torch.rand(2, 64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        upsampled_dice_loss(maps, targets, torch.sigmoid)
    assert sum(x.numel() for x in saved if x is not targets) <= maps.numel() + targets.numel() + 12
    assert max(x.numel() for x in saved) == targets.numel()


def _plainly(maps, targets, activation):
    return losses._UpsampledDiceLoss.apply(maps, targets, activation)


def _value_and_grad(function, maps, targets, activation):
    maps = maps.detach().requires_grad_()
    loss = function(maps, targets, activation)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), maps)


# Up, far up, up by a broken factor in each direction, down, and maps of one row or column.
RESIZES = [
    ((4, 5), (8, 10)),
    ((16, 16), (64, 64)),
    ((5, 7), (13, 37)),
    ((9, 40), (6, 17)),
    ((1, 6), (3, 1)),
    ((6, 1), (1, 35)),
    ((4, 5), (4, 5)),
]


@needs_extension
@pytest.mark.parametrize("activation", [torch.sigmoid, as_they_are])
@pytest.mark.parametrize(("size", "target_size"), RESIZES)
def test_dice_kernel_is_the_plain_loss(size, target_size, activation):
    torch.manual_seed(0)
    maps = (3 * torch.randn(2, *size, 3, dtype=torch.float64)).movedim(-1, 1)  # not contiguous
    targets = torch.rand(*target_size, 3, dtype=torch.float64).movedim(-1, 0)
    assert losses._has_dice_kernel(maps, targets, activation)
    found = _value_and_grad(upsampled_dice_loss, maps, targets, activation)
    torch.testing.assert_close(found, _value_and_grad(_plainly, maps, targets, activation))


@needs_extension
@pytest.mark.parametrize("activation", [torch.sigmoid, as_they_are])
def test_gradient_of_the_dice_kernel(activation):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(2, 5, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: upsampled_dice_loss(x, targets, activation), maps)


@needs_extension
@pytest.mark.parametrize("activation", [torch.sigmoid, as_they_are])
def test_dice_kernel_in_float32_errs_no_more_than_plain_pytorch(activation):
    """Twice the plain error, as both are a few roundings."""
    torch.manual_seed(0)
    maps, targets = 10 * torch.randn(2, 3, 50, 67), torch.rand(3, 100, 134).round()
    exact = _value_and_grad(_plainly, maps.double(), targets.double(), activation)
    plain = _value_and_grad(_plainly, maps, targets, activation)
    found = _value_and_grad(upsampled_dice_loss, maps, targets, activation)
    for ours, theirs, value in zip(found, plain, exact, strict=True):
        assert (ours - value).abs().max() <= 2 * (theirs - value).abs().max()


@needs_extension
def test_dice_kernel_gives_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    maps, targets = torch.randn(3, 7, 9, 11), torch.rand(7, 18, 22)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(_value_and_grad(upsampled_dice_loss, maps, targets, torch.sigmoid))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@needs_extension
def test_dice_kernel_of_extreme_and_non_finite_maps():
    """Large logits are certain, without overflow; NaN spoils its own segment's loss, no other."""
    maps = torch.tensor([-1000.0, 1000.0, math.nan]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    loss = upsampled_dice_loss(maps, torch.ones(3, 4, 4), torch.sigmoid)
    torch.testing.assert_close(loss, torch.tensor([[1.0, 0.0, math.nan]]), equal_nan=True)


@needs_extension
def test_dice_kernel_refuses_what_does_not_fit():
    call = torch.ops.psf.upsampled_dice_loss
    maps = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="maps must be"):
        call(maps, torch.zeros(2, 8, 10), True, 1e-6)
    with pytest.raises(RuntimeError, match="sides must be"):
        call(maps, torch.zeros(3, 0, 10), True, 1e-6)
    with pytest.raises(RuntimeError, match="targets must be"):
        call(maps, torch.zeros(3, 8, 10).double(), True, 1e-6)


@pytest.mark.parametrize("chunk", [losses.CHUNK_SIZE, 1])
def test_shrunk_masks(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_SIZE", chunk)
    masks = torch.rand(3, 6, 8) > 0.5
    expected = F.interpolate(masks[None].float(), size=(3, 4), mode="bilinear")[0]
    torch.testing.assert_close(shrink_masks(masks, (3, 4)), expected)
    assert shrink_masks(masks[:0], (3, 4)).shape == (0, 3, 4)
