import pytest
import torch
from torch.nn import functional as F

from psf.modeling import mask_head
from psf.modeling.mask_head import MaskHead, resize_masks

HEADS, CHANNELS = 3, 5
PADDED = [(5, 6), (3, 3), (2, 2)]
PART = [(4, 5), (2, 3), (1, 2)]


def arguments(num_queries=4, dtype=torch.float64, shapes=PADDED):
    """A mask head, and the queries and keys of one image; all with gradients."""
    torch.manual_seed(0)
    head = MaskHead(num_heads=HEADS, num_levels=len(shapes)).to(dtype)
    size = sum(h * w for h, w in shapes)
    q, k = (
        torch.randn(count, HEADS, CHANNELS, dtype=dtype).transpose(0, 1).requires_grad_()
        for count in (num_queries, size)
    )
    return head, q, k


def papers_order(head, q, k, shapes, valid):
    """Every head's logits are projected, rectified and upsampled, then all heads are projected."""
    logits = q @ k.mT / CHANNELS**0.5  # (M, R, S)
    heads = []
    for level, proj, shape, (h, w) in zip(
        logits.split([h * w for h, w in shapes], dim=2),
        head.level_projs,
        shapes,
        valid,
        strict=True,
    ):
        level = level.unflatten(2, shape)[:, :, :h, :w].permute(1, 2, 3, 0)  # (R, h, w, M)
        projected = proj(level).relu().permute(0, 3, 1, 2)
        heads.append(F.interpolate(projected, size=valid[0], mode="bilinear"))
    return head.mask_proj(torch.cat(heads, dim=1).permute(0, 2, 3, 1))[..., 0]


def values_and_gradients(function, head, q, k, *shapes):
    masks = function(q, k, *shapes)
    grad = torch.linspace(-1, 2, masks.numel(), dtype=masks.dtype).view_as(masks)
    return masks, *torch.autograd.grad(masks, (q, k, *head.parameters()), grad)


@pytest.mark.parametrize("most_stored", [0, 1 << 30])
@pytest.mark.parametrize("chunk_size", [1, 1 << 30])
@pytest.mark.parametrize("valid", [PADDED, PART])
@pytest.mark.parametrize("num_queries", [0, 1, 4])
def test_masks_are_those_of_the_papers_order(
    monkeypatch, num_queries, valid, chunk_size, most_stored
):
    """Values and gradients: all at once or one query at a time, stored or recomputed."""
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", chunk_size)
    monkeypatch.setattr(mask_head, "MOST_STORED", most_stored)
    head, q, k = arguments(num_queries)
    found = values_and_gradients(head, head, q, k, PADDED, valid)
    assert found[0].shape == (num_queries, *valid[0])
    if num_queries:  # interpolation of the reference does not take an empty batch of channels
        expected = values_and_gradients(
            lambda *args: papers_order(head, *args), head, q, k, PADDED, valid
        )
        torch.testing.assert_close(found, expected)
    else:
        assert all(not grad.any() for grad in found[1:])


@pytest.mark.parametrize("shapes", [[(5, 7)], [(5, 7), (5, 7), (9, 4), (1, 1)]])
def test_any_number_of_levels_and_any_sizes(shapes):
    head, q, k = arguments(shapes=shapes)
    expected = papers_order(head, q, k, shapes, shapes)
    torch.testing.assert_close(head(q, k, shapes, shapes), expected)


def test_half_precision_under_autocast_gives_single_precision_masks():
    head, q, k = arguments(dtype=torch.float32)
    expected = head(q, k, PADDED, PART)
    with torch.autocast("cpu", torch.bfloat16):
        masks = head(q.bfloat16(), k.bfloat16(), PADDED, PART)
    assert masks.dtype == torch.float32
    torch.testing.assert_close(masks, expected, atol=0.1 * expected.std().item(), rtol=0)


def test_training_stores_no_logits_of_large_inputs(monkeypatch):
    monkeypatch.setattr(mask_head, "MOST_STORED", 0)
    head, q, k = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        head(q, k, PADDED, PADDED)
    assert sum(x.numel() for x in saved) <= q.numel() + k.numel() + 100


def test_resizing_no_masks():
    assert resize_masks(torch.zeros(0, 3, 4), (6, 8)).shape == (0, 6, 8)
