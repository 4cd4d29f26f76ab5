"""Every entry of every released model: names, shapes, counts, learning rates, weight decays."""

import pytest
import torch
from detectron2.modeling import build_model
from release_cases import SHIPPED, numbers, release_cfg, trainable

from psf import checkpoint
from psf.solver import build_optimizer

MODELS = {
    "r50": "R50_24ep",
    "r101": "R101_24ep",
    "pvtv2b5": "PVTv2-B5_24ep",
    "swinl": "Swin-L_24ep",
}
# Drawing random weights that nobody looks at would take most of the time.
INITIALISATIONS = ("normal_", "trunc_normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_")


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    recorded = numbers(SHIPPED, f"keys/{request.param}")
    cfg = release_cfg(MODELS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        for name in INITIALISATIONS:
            patch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
        return recorded, cfg, build_model(cfg)


@pytest.fixture(scope="module")
def conversion(case):
    entries = {
        name: torch.empty(entry["shape"], device="meta")
        for name, entry in case[0]["entries"].items()
    }
    source = checkpoint.recognise(entries)
    assert source in checkpoint.AUTHORS
    return checkpoint.convert(entries, source)


def test_every_entry_is_in_the_model_or_dropped_with_a_reason(case, conversion):
    recorded, _, model = case
    own = model.state_dict()
    assert conversion.state_dict.keys() == own.keys()
    for name, value in conversion.state_dict.items():
        assert value.shape == own[name].shape, name
    assert len(conversion.state_dict) + len(conversion.dropped) == len(recorded["entries"])
    heads = [n for n in conversion.dropped if not n.endswith("num_batches_tracked")]
    assert len(heads) == 4 * 2 + 4 * 6  # 4 layers' classes and boxes of things


def test_back_to_the_authors_names(case, conversion):
    back = checkpoint.to_authors(conversion.state_dict)
    assert back.keys() | conversion.dropped.keys() == case[0]["entries"].keys()


def test_parameter_counts(case, conversion):
    recorded, _, model = case
    entries = recorded["entries"]
    heads = sum(
        torch.Size(entries[name]["shape"]).numel()
        for name in conversion.dropped
        if entries[name]["kind"] == "param"
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == recorded["num_trainable"] - heads


def test_learning_rates_and_weight_decays(case, conversion):
    recorded, cfg, model = case
    optimizer = build_optimizer(cfg, model)
    assert list(optimizer.defaults["betas"]) == recorded["adamw"]["betas"]
    assert optimizer.defaults["eps"] == recorded["adamw"]["eps"]
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = trainable(model)
    assert len(found) == len(parameters)
    for name, parameter in parameters.items():
        entry = recorded["entries"][name]
        assert found[parameter] == pytest.approx((entry["lr"], entry["weight_decay"])), name
    wanted = {name for name, entry in recorded["entries"].items() if entry.get("requires_grad")}
    assert wanted - conversion.dropped.keys() == parameters.keys()
