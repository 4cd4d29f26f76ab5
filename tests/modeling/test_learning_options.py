"""What every option that learns faster must keep, alone and with the others."""

import pytest
import torch
from detectron2.modeling import build_model
from learning_options import FOR_DECOUPLED, LEARNING_OPTIONS
from random_input import make_input
from training_step import build_exact_model, odd_batch, take_step

CASES = [("joint", name, pairs) for name, pairs in LEARNING_OPTIONS.items()]
CASES += [("decoupled", name, pairs) for name, pairs in FOR_DECOUPLED.items()]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def cfg(request, tiny_cfg):
    decoder, _, pairs = request.param
    tiny_cfg.merge_from_list(["MODEL.PSF.MASK_DECODER.NAME", decoder, *pairs])
    return tiny_cfg


@pytest.mark.parametrize("classes", [[], [3, 4], [0, 1, 2] * 4, [0, 2, 3]], ids=len)
@pytest.mark.parametrize("size", [(1, 1), (40, 60)])
def test_losses_and_gradients_are_finite(cfg, classes, size):
    model = build_model(cfg).train()
    losses = model([make_input(*size, classes), make_input(48, 40, [1])])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: DDP would hang"
        assert parameter.grad.isfinite().all(), name


def test_an_image_learns_the_same_in_any_batch(cfg):
    """Accumulated one by one, the images give the losses and gradients of the whole batch."""
    model = build_exact_model(cfg)
    data = odd_batch()
    expected, losses = take_step(model, data)
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    found, found_losses = take_step(model, data, accumulate_steps=4)
    assert found_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
    for key, grad in expected.items():
        assert (found[key] - grad).norm() < 1e-5 * whole + 1e-4 * grad.norm(), key


def test_recomputed_layers_give_the_same_gradients(cfg):
    data = odd_batch()
    expected, losses = take_step(build_exact_model(cfg), data)
    cfg.MODEL.PSF.CHECKPOINT = ["backbone", "encoder", "location_decoder", "mask_decoder"]
    found, found_losses = take_step(build_exact_model(cfg), data)
    assert found_losses == pytest.approx(losses)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_inference_needs_no_option_of_training(cfg):
    """Without the options of training, the weights predict the same; a seed changes nothing."""
    model = build_model(cfg).eval()
    location = cfg.MODEL.PSF.LOCATION_DECODER
    for options, key, off in (
        (location.ONE_TO_MANY, "QUERIES", 0),
        (cfg.MODEL.PSF, "QUALITY_SCORES", False),
        (cfg.MODEL.PSF.MASK_POINTS, "WEIGHT", 0.0),
    ):
        options[key] = off
    if location.QUERY_SELECTION:
        location.DENOISING.GROUPS = 0
    plain = build_model(cfg).eval()
    weights = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    weights["location_decoder.query_embed.weight"] = weights["location_decoder.query_embed.weight"][
        :6
    ]
    if "location_decoder.anchors" in weights:
        weights["location_decoder.anchors"] = weights["location_decoder.anchors"][:6]
    plain.load_state_dict(weights)
    image = make_input(40, 60, [])
    (expected,), (found,) = plain([image]), model([{**image, "seed": 5}])
    assert torch.equal(found["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert found["panoptic_seg"][1] == expected["panoptic_seg"][1]
    assert len(expected["panoptic_seg"][1]) > 0


def test_extra_queries_leave_the_others_alone(tiny_cfg):
    """With denoising and one-to-many queries, thing queries predict what they do without."""
    tiny_cfg.merge_from_list(LEARNING_OPTIONS["all"])
    model = build_exact_model(tiny_cfg)
    data = odd_batch()
    losses = model(data)
    model.denoising = None
    model.location_decoder.options = model.location_decoder.options._replace(num_one_to_many=0)
    model.location_decoder.query_embed = torch.nn.Embedding.from_pretrained(
        model.location_decoder.query_embed.weight[:6]
    )
    without = model(data)
    extra = {name for name in losses if "one_to_many" in name or "denoising" in name}
    assert len(extra) == 2 * 3 * 2
    assert without.keys() == losses.keys() - extra
    for name, loss in without.items():
        torch.testing.assert_close(loss, losses[name])


def test_points_need_masks_that_are_probabilities(tiny_cfg):
    tiny_cfg.merge_from_list(LEARNING_OPTIONS["points"])
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = "decoupled"
    with pytest.raises(ValueError, match=r"MASK_POINTS\.WEIGHT is 5\.0, but the masks of .*joint"):
        build_model(tiny_cfg)
