import math

import torch

from psf.modeling.losses import dice_cost, dice_loss, focal_cost, sigmoid_focal_loss


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
