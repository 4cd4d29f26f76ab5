import pytest
import torch

from psf.layers.boxes import (
    compare_boxes,
    cxcywh_to_xyxy,
    generalized_box_iou,
    masks_to_boxes,
    xyxy_to_cxcywh,
)
from psf.layers.ms_deform_attn import has_extension


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


def test_boxes_without_area_are_finite_and_differentiable():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    value = generalized_box_iou(point, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    value.backward()
    assert value.isfinite()
    assert point.grad.isfinite().all()


def random_boxes(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """cxcywh, many of which overlap and some of which lie within another."""
    return torch.rand(*shape, 4, dtype=dtype) * torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=dtype)


def plain(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    iou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others))
    return (boxes - others).abs().sum(-1), iou


def corner_cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Equal boxes, shared sides, points, boxes that touch or lie apart, negative sizes."""
    first, second = torch.tensor(
        [
            [[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.25, 0.5]],
            [[0.5, 0.5, 0.5, 0.5], [0.625, 0.5, 0.25, 0.5]],
            [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]],
            [[0.5, 0.5, 0.0, 0.0], [0.25, 0.5, 0.0, 0.0]],
            [[0.25, 0.5, 0.25, 0.5], [0.5, 0.5, 0.25, 0.5]],
            [[0.125, 0.25, 0.125, 0.25], [0.75, 0.75, 0.25, 0.125]],
            [[0.5, 0.5, -0.5, 0.25], [0.5, 0.5, 0.25, 0.25]],
        ],
        dtype=torch.float64,
    ).unbind(1)
    return first, second


@pytest.mark.parametrize("case", ["random", "strided", "empty", "corners"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compared_boxes_are_those_of_the_functions(case, dtype):
    torch.manual_seed(0)
    boxes, others = {
        "random": lambda: (random_boxes(3, 50), random_boxes(3, 50)),
        "strided": lambda: (random_boxes(5, 3).transpose(0, 1), random_boxes(3, 5)),
        "empty": lambda: (random_boxes(3, 0), random_boxes(3, 0)),
        "corners": corner_cases,
    }[case]()
    boxes, others = boxes.to(dtype).requires_grad_(), others.to(dtype)
    found, expected = compare_boxes(boxes, others), plain(boxes, others)
    weights = [torch.randn_like(x) for x in expected]
    gradients = []
    for results in (found, expected):
        total = sum((w * x).sum() for w, x in zip(weights, results, strict=True))
        gradients.append(torch.autograd.grad(total, boxes)[0])
    for own, true in [*zip(found, expected, strict=True), gradients]:
        assert own.dtype == dtype
        torch.testing.assert_close(own, true)


def test_one_result_of_a_comparison_is_differentiable_alone():
    boxes, others = random_boxes(4).requires_grad_(), random_boxes(4)
    for i in range(2):
        (own,) = torch.autograd.grad(compare_boxes(boxes, others)[i].sum(), boxes)
        (true,) = torch.autograd.grad(plain(boxes, others)[i].sum(), boxes)
        torch.testing.assert_close(own, true)


def test_boxes_of_another_type_are_compared_in_that_of_the_first():
    boxes, others = random_boxes(4), random_boxes(4, dtype=torch.float32)
    for own, true in zip(compare_boxes(boxes, others), plain(boxes, others), strict=True):
        torch.testing.assert_close(own, true)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_comparison_with_what_is_not_finite_is_not(value):
    for coordinate in range(4):
        boxes, others = random_boxes(1), random_boxes(1)
        boxes[0, coordinate] = value
        assert not torch.stack(compare_boxes(boxes, others)).isfinite().all()


needs_extension = pytest.mark.skipif(not has_extension(), reason="needs the extension")


@needs_extension
def test_a_comparison_names_what_does_not_fit():
    operator = torch.ops.psf.compare_boxes.default
    with pytest.raises(
        RuntimeError, match=r"both must be \(\.\.\., 4\), got \[2, 4\] and \[3, 4\]"
    ):
        operator(random_boxes(2), random_boxes(3))
    with pytest.raises(RuntimeError, match="all must be Double as the first is, got Float"):
        operator(random_boxes(2), random_boxes(2, dtype=torch.float32))


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert masks_to_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5], [0, 0, 0, 0]]
