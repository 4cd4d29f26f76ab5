import torch

from psf.layers.boxes import cxcywh_to_xyxy
from psf.modeling.denoising import DenoisingOptions, noise_things

LABELS = [torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 1, 0])]
BOXES = [
    torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.4, 0.1, 0.1]]),
    torch.zeros(0, 4),
    torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 3),
]
OPTIONS = DenoisingOptions(num_groups=400, label_noise=0.3, box_noise=0.5, contrastive=True)


def noise(images, options=OPTIONS):
    generators = [torch.Generator().manual_seed(i) for i in images]
    labels, boxes = [LABELS[i] for i in images], [BOXES[i] for i in images]
    return noise_things(labels, boxes, 3, options, generators)


def test_every_thing_is_to_be_restored_and_to_be_rejected_once_in_every_group():
    noised = noise([0, 1, 2])
    target = noised.target.unflatten(1, (400, 2, 3))
    assert noised.valid.unflatten(1, (400, 2, 3)).sum((1, 2, 3)).tolist() == [1600, 0, 2400]
    assert target[0, :, 0].unique(dim=0).tolist() == [[0, 1, -1]]
    assert target[2, :, 0].unique(dim=0).tolist() == [[0, 1, 2]]
    assert target[1].eq(-1).all()
    assert target[:, :, 1].eq(-1).all()


def test_edges_move_by_the_promised_part_of_the_side():
    noised = noise([2])
    edges = cxcywh_to_xyxy(noised.boxes).unflatten(1, (400, 2, 3))
    shift = (edges - torch.tensor([0.3, 0.3, 0.7, 0.7])).abs() / 0.2  # in halves of the side
    restored, rejected = shift[0, :, 0], shift[0, :, 1]
    assert restored.max() <= 0.5 + 1e-5
    assert restored.mean().sub(0.25).abs() < 0.02
    assert 0.5 - 1e-5 <= rejected.min() < 0.51
    assert 0.99 < rejected.max() <= 1 + 1e-5


def test_a_part_of_the_labels_is_wrong():
    noised = noise([2])
    labels = noised.labels.unflatten(1, (400, 2, 3))[0]
    wrong = (labels != LABELS[2]).float().mean()
    assert abs(wrong - 0.3 * 2 / 3) < 0.03  # a random label may be the right one
    assert labels.min() >= 0
    assert labels.max() <= 2


def test_the_noise_of_an_image_depends_on_no_other():
    alone, together = noise([0]), noise([0, 2])
    cut = [x.unflatten(1, (400, 2, 3))[:1, :, :, :2].flatten(1, 3) for x in together[:4]]
    for expected, found in zip(alone[:4], cut, strict=True):
        assert torch.equal(found, expected)


def test_boxes_stay_inside_the_image_and_valid():
    noised = noise([0, 2], OPTIONS._replace(box_noise=3.0))
    edges = cxcywh_to_xyxy(noised.boxes)
    assert edges.min() >= -1e-6
    assert edges.max() <= 1 + 1e-6
    assert noised.boxes[..., 2:].min() >= 0


def test_a_batch_without_things_has_no_denoising_queries():
    noised = noise([1, 1])
    assert noised.boxes.shape == (2, 0, 4)


def test_without_contrast_all_queries_are_to_be_restored():
    noised = noise([0, 2], OPTIONS._replace(contrastive=False))
    target = noised.target.unflatten(1, (400, 3))
    assert target[0].unique(dim=0).tolist() == [[0, 1, -1]]
    assert target[1].unique(dim=0).tolist() == [[0, 1, 2]]
    assert noised.valid.sum(1).tolist() == [800, 1200]
    assert noised.num_groups == 400
