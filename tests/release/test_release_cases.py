"""What is shipped is what was recorded, and the seed gives the weights it was recorded with."""

import pytest
import torch
from detectron2.modeling import build_model
from release_cases import (
    REFERENCE,
    SHIPPED,
    SMALL,
    arrays,
    load_official,
    numbers,
    release_cfg,
    seeded,
    small_model,
)

pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the recordings are not beside this folder"
)


def names(suffix):
    return sorted(
        str(path.relative_to(SHIPPED)).removesuffix(suffix)
        for path in SHIPPED.rglob(f"*{suffix}")
        if path.name != "overrides.npz"
    )


@pytest.mark.parametrize("name", names(".npz"))
def test_arrays(name):
    recorded = arrays(REFERENCE, name)
    for key, value in arrays(SHIPPED, name).items():
        assert torch.equal(value, recorded[key]), key


@pytest.mark.parametrize("name", names(".json.gz"))
def test_numbers(name):
    recorded = numbers(REFERENCE, name)
    if isinstance(recorded, list):
        assert numbers(SHIPPED, name) == recorded
        return
    for entry in recorded.get("entries", {}).values():
        entry.pop("init", None)
    for key, value in numbers(SHIPPED, name).items():
        assert value == recorded[key], key


def test_weights_of_the_small_model():
    model = build_model(release_cfg("R50_24ep", SMALL))
    load_official(model, arrays(REFERENCE, "small/state_dict"))
    expected = small_model().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["pvt_v2_tiny", "swin_micro"])
def test_weights_of_the_backbones(name):
    seed = numbers(REFERENCE, f"backbones/{name}")["seed"]
    for key, value in arrays(REFERENCE, f"backbones/{name}").items():
        if key.startswith("state/") and value.is_floating_point():
            assert torch.equal(seeded(seed, key.removeprefix("state/"), value.shape), value)
