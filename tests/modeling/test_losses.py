import math

import pytest
import torch
from torch.nn import functional as F

from psf.modeling import losses
from psf.modeling.losses import (
    dice_cost,
    dice_loss,
    focal_cost,
    point_loss,
    quality_focal_loss,
    shrink_masks,
    sigmoid_focal_loss,
    upsampled_dice_loss,
)


def test_no_segments():
    assert dice_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)
    assert focal_cost(torch.zeros(2, 3, 5), torch.zeros(0, dtype=torch.int64)).shape == (2, 3, 0)
    assert dice_cost(torch.zeros(0, 4, 5), torch.zeros(0, 4, 5)).shape == (0, 0)
    assert dice_cost(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 1


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


@pytest.mark.parametrize("most_stored", [0, 1 << 30])
@pytest.mark.parametrize("chunk", [losses.CHUNK_SIZE, 200])  # all at once, one segment
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.relu])
@pytest.mark.parametrize(("layers", "num_segments"), [(2, 0), (1, 1), (3, 5)])
def test_upsampled_dice_loss_is_the_dice_loss_of_upsampled_masks(
    monkeypatch, layers, num_segments, activation, chunk, most_stored
):
    monkeypatch.setattr(losses, "CHUNK_SIZE", chunk)
    monkeypatch.setattr(losses, "MOST_STORED", most_stored)
    logits = torch.randn(layers, num_segments, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(num_segments, 8, 9, dtype=torch.float64)
    found = upsampled_dice_loss(logits, targets, activation)
    expected = logits.sum((2, 3))
    if num_segments:
        masks = activation(F.interpolate(logits, size=(8, 9), mode="bilinear"))
        expected = torch.stack([dice_loss(layer, targets) for layer in masks])
    torch.testing.assert_close(found, expected)
    weights = torch.rand_like(found)
    (grad,), (expected_grad,) = (
        torch.autograd.grad((loss * weights).sum(), logits) for loss in (found, expected)
    )
    torch.testing.assert_close(grad, expected_grad)


def test_upsampled_dice_loss_stores_nothing_of_the_masks_size(monkeypatch):
    monkeypatch.setattr(losses, "MOST_STORED", 0)
    logits, targets = torch.randn(3, 2, 4, 4, requires_grad=True), torch.rand(2, 64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        upsampled_dice_loss(logits, targets, torch.sigmoid)
    assert sum(x.numel() for x in saved) <= logits.numel() + targets.numel()


def test_nan_spoils_the_loss_of_its_own_segment_only():
    logits = torch.tensor([-1000.0, 1000.0, math.nan]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    loss = upsampled_dice_loss(logits, torch.ones(3, 4, 4), torch.sigmoid)
    torch.testing.assert_close(loss, torch.tensor([[1.0, 0.0, math.nan]]), equal_nan=True)


@pytest.mark.parametrize("chunk", [losses.CHUNK_SIZE, 1])
def test_shrunk_masks(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_SIZE", chunk)
    masks = torch.rand(3, 6, 8) > 0.5
    expected = F.interpolate(masks[None].float(), size=(3, 4), mode="bilinear")[0]
    torch.testing.assert_close(shrink_masks(masks, (3, 4)), expected)
    assert shrink_masks(masks[:0], (3, 4)).shape == (0, 3, 4)


def test_scores_learn_the_quality_of_what_they_score():
    """
    p = 0.5, quality 0.8: 0.25 * 0.3^2 * ln 2; absent: 0.75 * 0.5^2 * ln 2.

    Where the probability is the quality, nothing is left to learn.
    """
    logits = torch.tensor([0.0, 0.0, math.log(4)], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([0.8, 0.0, 0.8]))
    expected = torch.tensor([0.0225 * math.log(2), 0.1875 * math.log(2), 0.0])
    torch.testing.assert_close(loss, expected, atol=1e-7, rtol=1e-5)
    loss[2].backward()
    assert logits.grad.abs().max() < 1e-6


def test_quality_one_is_the_focal_loss():
    logits = torch.randn(50)
    targets = torch.randint(2, (50,)).float()
    torch.testing.assert_close(
        quality_focal_loss(logits, targets), sigmoid_focal_loss(logits, targets)
    )


def points(logits, masks, num_points=400, seed=0):
    return point_loss(logits, masks, num_points, torch.Generator().manual_seed(seed))


def test_constant_masks_cost_the_same_at_every_point():
    """Probability 0.5 everywhere: ln 2, whatever the mask; right by a logit of 30: nothing."""
    masks = torch.zeros(2, 17, 33, dtype=torch.bool)
    masks[0] = True
    logits = torch.tensor([[0.0, 0.0], [30.0, -30.0]])[..., None, None].expand(2, 2, 4, 8)
    expected = torch.tensor([[math.log(2)] * 2, [0.0] * 2])
    torch.testing.assert_close(points(logits, masks), expected, atol=1e-6, rtol=0)


def test_points_lie_on_the_pixels_that_they_are_compared_with():
    """Logits of the mask's own resolution are right at all pixels' centres but the edge's."""
    masks = torch.rand(3, 20, 30) > 0.5
    masks[:, :10], masks[:, 10:] = True, False
    right = (masks.float() * 60 - 30)[None]
    assert points(right, masks).max() < 0.5
    assert points(-right, masks).min() > 2


def test_points_gather_where_masks_are_uncertain():
    """Uncertain in a tenth of the image: three quarters of the points fall into it."""
    logits = torch.full((1, 1, 10, 100), 20.0)
    logits[..., :10] = 0
    loss = points(logits, torch.ones(1, 10, 100, dtype=torch.bool), num_points=120)
    # Of 360 candidates about 38 are uncertain (and a few between): all are among the 90 chosen.
    assert 25 * math.log(2) < 120 * loss.item() < 60 * math.log(2)


def test_no_masks_have_no_points():
    none = points(torch.zeros(3, 0, 4, 4), torch.zeros(0, 8, 8, dtype=torch.bool))
    assert none.shape == (3, 0)
