import torch

from psf.layers.boxes import (
    box_iou,
    cxcywh_to_xyxy,
    generalized_box_iou,
    masks_to_boxes,
    xyxy_to_cxcywh,
)


def test_no_boxes():
    none = torch.zeros(0, 4)
    assert generalized_box_iou(none, none).shape == (0,)
    assert generalized_box_iou(torch.rand(3, 1, 4), none).shape == (3, 0)
    assert masks_to_boxes(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 4)


def test_conversions_are_inverse():
    boxes = torch.rand(7, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    assert cxcywh_to_xyxy(torch.tensor([2.0, 3.0, 2.0, 4.0])).tolist() == [1, 1, 3, 5]


def test_generalized_iou_by_hand():
    """Unit squares: the same, one shifted by half, one a unit apart."""
    square = torch.tensor([0.0, 0.0, 1.0, 1.0])
    others = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.5, 1.0], [2.0, 0.0, 3.0, 1.0]])
    # IoU 1, hull = union; IoU 1/3, hull = union; IoU 0, hull 3, union 2: -1/3.
    torch.testing.assert_close(
        generalized_box_iou(square, others), torch.tensor([1.0, 1 / 3, -1 / 3])
    )
    torch.testing.assert_close(box_iou(square, others), torch.tensor([1.0, 1 / 3, 0.0]))


def test_boxes_without_area_are_finite_and_differentiable():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    value = generalized_box_iou(point, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    value.backward()
    assert value.isfinite()
    assert point.grad.isfinite().all()


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert masks_to_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5], [0, 0, 0, 0]]
