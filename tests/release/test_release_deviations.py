"""Where this project differs from the authors' code on purpose (README, "Differences")."""

import copy

import pytest
import random_input
import torch
from detectron2.modeling import build_model
from release_cases import (
    SHIPPED,
    SMALL,
    arrays,
    predict_and_match,
    release_cfg,
    small_model,
    training_input,
)

# Images without things keep the stuff class loss: test_release_losses.py.


@pytest.fixture
def model():
    return copy.deepcopy(small_model()).train()


def image(name="small/forward_A", index=0):
    return arrays(SHIPPED, name)[f"img_rgb_uint8/{index}"]


def make_input(labels, size, picture):
    """Random segments of the given classes."""
    torch.manual_seed(0)
    height, width = size
    low = torch.rand(len(labels), 2) * torch.tensor([width / 2, height / 2])
    case = {
        "gt/0/bboxes": torch.cat([low, low + torch.tensor([width / 3, height / 3])], dim=1),
        "gt/0/labels": torch.tensor(labels),
        "gt/0/masks": torch.rand(len(labels), height, width) > 0.5,
    }
    return training_input(case, picture)


def test_more_things_than_queries(model):
    """Of 25 things the 20 queries take one each; there the assignment is None and training ends."""
    inputs = make_input([*range(25), 80], (149, 203), image())
    locations, predictions, targets, matchings = predict_and_match(model, inputs)
    (again,) = model.criterion.match_again(locations, predictions, targets, matchings[-1])
    assert len(again.target) == len(set(again.target.tolist())) == 20
    assert set(again.target.tolist()) == set(matchings[-1][0].target.tolist())
    losses = model([inputs])
    assert all(loss.isfinite() for loss in losses.values())


def test_several_images_of_different_size_a_process(model):
    """The mean over all segments; there the loss raises for two images."""
    first = make_input([3, 40, 81], (149, 203), image())
    second = make_input([7, 90, 100], (128, 96), image("small/forward_AB", 1))
    together, one, two = model([first, second]), model([first]), model([second])
    for name, loss in together.items():
        torch.testing.assert_close(loss, (one[name] + two[name]) / 2, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_no_prediction():
    """It is masked and cropped; there it leaks into masks, which are resized with it."""
    small, large = (
        {"image": picture.permute(2, 0, 1)} for picture in (image("small/forward_AB", 1), image())
    )
    model = small_model()
    (alone,), (together, _) = model([small]), model([small, large])
    differ = alone["panoptic_seg"][0] != together["panoptic_seg"][0]
    assert differ.float().mean() < 1e-3  # pixels at the threshold may fall on either side
    assert len(alone["panoptic_seg"][1]) == len(together["panoptic_seg"][1])


def test_building_a_model_changes_no_config():
    """There the second matching's class weight doubles at every building."""
    cfg = release_cfg("R50_24ep", SMALL)
    before = cfg.clone()
    weights = [build_model(cfg).criterion.mask_matching for _ in range(2)]
    assert cfg == before
    assert weights[0] == weights[1]
    assert weights[0].detection.class_weight == 4


@pytest.mark.parametrize("classes", [[0, 1, 2, 4], [2], [0], []])
def test_any_numbers_of_classes(tiny_cfg, classes):
    """Here three and two; there 80 and 53 are in the code."""
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = "decoupled"
    tiny_cfg.MODEL.PSF.NUM_FEATURE_LEVELS = 4
    tiny_cfg.MODEL.PSF.HIDDEN_DIM = 64  # more than the 32 groups of the normalisation
    model = build_model(tiny_cfg)
    inputs = random_input.make_input(40, 60, classes)
    losses = model([inputs])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    (output,) = model.eval()([inputs])
    assert output["panoptic_seg"][0].shape == (40, 60)


def test_heads_without_a_loss_are_not_built():
    names = small_model().state_dict()
    assert not any(name.startswith("mask_decoder.thing_heads") for name in names)
    assert not any(".box_heads." in name for name in names if name.startswith("mask_decoder"))
