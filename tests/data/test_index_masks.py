import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances

from psf.data import IndexMasks
from psf.data.index_masks import tight_boxes


def test_no_masks():
    masks = IndexMasks(torch.zeros(3, 4, dtype=torch.uint8), ())
    assert masks.tensor.shape == (0, 3, 4)
    assert len(masks.get_bounding_boxes()) == 0


def test_index_masks_are_bit_masks():
    index_map = torch.tensor([[1, 1, 0], [3, 2, 2]], dtype=torch.uint8)
    masks = IndexMasks(index_map, (1, 2, 3))
    dense = BitMasks(torch.stack([index_map == i for i in (1, 2, 3)]))
    assert isinstance(masks, BitMasks)
    assert torch.equal(masks.tensor, dense.tensor)
    assert torch.equal(masks.get_bounding_boxes().tensor, dense.get_bounding_boxes().tensor)
    keep = torch.tensor([True, False, True])
    for item in (1, slice(1, 3), keep, torch.tensor([2, 0])):
        assert torch.equal(masks[item].tensor, dense[item].tensor)
    assert torch.equal(BitMasks.cat([dense, dense]).tensor, IndexMasks.cat([masks, masks]).tensor)
    assert [m.tolist() for m in masks] == dense.tensor.tolist()
    assert torch.equal(masks.to("cpu").tensor, dense.tensor)
    assert masks.nonempty().all()
    assert "3" in repr(masks)
    instances = Instances((2, 3), gt_masks=masks, gt_classes=torch.arange(3))
    chosen = instances[keep]
    assert torch.equal(chosen.gt_masks.tensor, dense.tensor[keep])
    assert len(Instances.cat([instances, chosen]).gt_masks) == 5
    copied = pickle.loads(pickle.dumps(masks))
    assert torch.equal(copied.tensor, dense.tensor)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_boxes_in_one_pass(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        index_map = rng.integers(0, 6, shape).astype(np.uint8) * (rng.random(shape) < 0.3)
        boxes = tight_boxes(index_map, 6)
        for i in range(1, 7):
            y, x = np.nonzero(index_map == i)
            expected = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0]
            assert boxes[i - 1].tolist() == expected
