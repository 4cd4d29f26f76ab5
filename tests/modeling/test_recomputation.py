import copy
import re

import pytest
import torch
from detectron2.modeling import build_model
from random_input import make_input

PARTS = ["backbone", "encoder", "location_decoder", "mask_decoder"]


def losses_and_gradients(model, data, **autocast):
    torch.manual_seed(3)  # of the dropout
    model.zero_grad()
    with torch.autocast("cpu", **{"enabled": False, **autocast}):
        losses = model(data)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def saved_numbers(model, data) -> int:
    """How many numbers the forward pass leaves for the backward pass."""
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model(data)
    del losses
    return sum(saved.values())


@pytest.mark.parametrize("name", ["joint", "decoupled"])
@pytest.mark.parametrize("autocast", [{}, {"enabled": True, "dtype": torch.bfloat16}])
def test_losses_and_gradients_stay_the_same_with_dropout(tiny_cfg, name, autocast):
    tiny_cfg.MODEL.PSF.DROPOUT = 0.2
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = name
    data = [make_input(64, 96, [0, 2, 3]), make_input(80, 64, [4], seed=1)]
    model = build_model(tiny_cfg).train()
    tiny_cfg.MODEL.PSF.CHECKPOINT = PARTS
    again = build_model(tiny_cfg).train()
    again.load_state_dict(model.state_dict())
    losses, grads = losses_and_gradients(model, data, **autocast)
    found, found_grads = losses_and_gradients(again, data, **autocast)
    for key, loss in losses.items():
        torch.testing.assert_close(found[key], loss)
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(found_grads[key], grad, atol=1e-6, rtol=1e-5)
        else:
            assert found_grads[key] is None


@pytest.mark.parametrize("part", PARTS)
def test_every_part_stores_less(tiny_cfg, part):
    data = [make_input(96, 128, [0, 2, 3])]
    stored = saved_numbers(build_model(tiny_cfg).train(), data)
    tiny_cfg.MODEL.PSF.CHECKPOINT = [part]
    assert saved_numbers(build_model(tiny_cfg).train(), data) < stored


def test_a_copy_computes_with_its_own_weights(tiny_cfg):
    tiny_cfg.MODEL.PSF.CHECKPOINT = PARTS
    model = build_model(tiny_cfg).train()
    data = [make_input(64, 64, [0, 3])]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    losses, grads = losses_and_gradients(twin, data)
    assert sum(grad.abs().sum() for grad in grads.values() if grad is not None) > 0
    assert all(p.grad is None for p in model.parameters())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["MODEL.PSF.CHECKPOINT", ["pixels"]], "has ['pixels']; known parts: ['backbone'"),
        (["MODEL.RESNETS.NORM", "BN"], "would count every image twice. Set MODEL.RESNETS.NORM"),
        (["MODEL.BACKBONE.NAME", "build_swin_backbone"], "Use MODEL.SWIN.USE_CHECKPOINT"),
    ],
)
def test_what_cannot_be_recomputed_is_named(tiny_cfg, changes, message):
    tiny_cfg.MODEL.PSF.CHECKPOINT = ["backbone"]
    tiny_cfg.merge_from_list(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(tiny_cfg)
