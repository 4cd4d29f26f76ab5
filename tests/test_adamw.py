"""The optimizer against torch's, bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn

from psf.adamw import PackedAdamW

KINDS = (PackedAdamW, torch.optim.AdamW)


def make_parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(5, 7), (3,), (), (0, 2)]]


def make(kind, parameters, **options):
    """Two groups that differ in all that may differ."""
    groups = [
        {"params": parameters[:2], "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)},
        {"params": parameters[2:], "eps": 1e-3},
    ]
    return kind(groups, fused=True, **options)


def run(optimizer, steps=3, seed=1, without=()):
    """Some steps; ``without``: positions of the parameters that get no gradient."""
    torch.manual_seed(seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for i, parameter in enumerate(parameters):
            gradient = torch.randn_like(parameter)
            parameter.grad = None if i in without else gradient
        optimizer.step()


def assert_same(*optimizers):
    """Parameters and the whole of the state."""
    a, b = (optimizer.state_dict() for optimizer in optimizers)
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert state.keys() == b["state"][i].keys()
        for key, value in state.items():
            other = b["state"][i][key]
            assert value.dtype == other.dtype
            assert torch.equal(value, other), (i, key)
    groups = (optimizer.param_groups for optimizer in optimizers)
    for group, other in zip(*groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)


def packs(optimizer):
    """Whether the steps of every group share their memory."""
    groups = [[optimizer.state[p]["step"] for p in g["params"]] for g in optimizer.param_groups]
    return all(len({s.untyped_storage().data_ptr() for s in steps}) == 1 for steps in groups)


@pytest.mark.parametrize(
    "options", [{}, {"maximize": True}, {"amsgrad": True}, {"lr": torch.tensor(0.01)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_torchs(dtype, options):
    optimizers = [make(kind, make_parameters(dtype), **options) for kind in KINDS]
    for optimizer in optimizers:
        run(optimizer)
        optimizer.param_groups[0]["lr"] *= 0.5  # as a schedule does
        run(optimizer)
    assert_same(*optimizers)
    assert packs(optimizers[0]) == ("amsgrad" not in options)


def test_the_gradient_is_divided_by_the_scale():
    optimizers = [make(kind, make_parameters()) for kind in KINDS]
    for optimizer in optimizers:
        for scale in (1.0, 8.0, 2.0):
            optimizer.grad_scale = torch.tensor(scale)
            run(optimizer, steps=1, seed=int(scale))
    assert_same(*optimizers)


def test_what_a_loss_scaler_found_infinite_changes_nothing():
    optimizers = [make(kind, make_parameters()) for kind in KINDS]
    for optimizer in optimizers:
        run(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        run(optimizer)
        del optimizer.found_inf
        run(optimizer)
    assert_same(*optimizers)
    assert optimizers[0].state_dict()["state"][0]["step"] == 6


def test_parameters_that_get_no_gradient_stay_behind():
    optimizers = [make(kind, make_parameters()) for kind in KINDS]
    for optimizer in optimizers:
        run(optimizer, without=[0])  # the first step: no state
    assert_same(*optimizers)
    for optimizer in optimizers:
        run(optimizer)
        run(optimizer, without=[1, 2, 3])
        run(optimizer)
    assert_same(*optimizers)
    states = optimizers[0].state_dict()["state"]
    assert [int(state["step"]) for state in states.values()] == [9, 9, 9, 9]
    assert packs(optimizers[0])


def test_gradients_of_mixed_types_are_left_to_torch():
    optimizers = []
    for kind in KINDS:
        parameters = [*make_parameters()[:2], *make_parameters(torch.float64)[:2]]
        optimizers.append(kind(parameters, fused=True))
        run(optimizers[-1])
    assert_same(*optimizers)


def test_sparse_gradients_are_refused_as_by_torch():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = PackedAdamW([parameter], fused=True)
    run(optimizer)
    parameter.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_without_options_or_parameters(fused):
    """Not fused, an empty group, a closure: what torch does."""
    optimizers = []
    for kind in KINDS:
        parameters = make_parameters()
        optimizers.append(kind([{"params": parameters[:3]}, {"params": []}], fused=fused))
        run(optimizers[-1])
        assert optimizers[-1].step(lambda: 5) == 5
    assert_same(*optimizers)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_checkpoints_go_both_ways(source, target):
    first, second = make(source, make_parameters()), make(target, make_parameters())
    run(first)
    file = io.BytesIO()
    parameters = [p for group in first.param_groups for p in group["params"]]
    torch.save({"optimizer": first.state_dict(), "parameters": parameters}, file)
    file.seek(0)
    loaded = torch.load(file)
    run(second, steps=2, seed=5)  # a state that is to be forgotten
    second.load_state_dict(loaded["optimizer"])
    for group, other in zip(second.param_groups, first.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            p.data.copy_(q.data)
    for optimizer in (first, second):
        run(optimizer, seed=6)
    assert_same(first, second)


def test_a_checkpoint_is_no_larger():
    sizes = []
    for kind in KINDS:
        optimizer = make(kind, make_parameters())
        run(optimizer)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_do_not_share_their_steps(kind):
    """By deepcopy, and by a state that both have loaded from."""
    optimizer = make(kind, make_parameters())
    run(optimizer)
    copied = copy.deepcopy(optimizer)
    run(copied)
    assert [int(s["step"]) for s in optimizer.state.values()] == [3] * 4
    assert [int(s["step"]) for s in copied.state.values()] == [6] * 4
    run(optimizer)
    assert_same(optimizer, copied)


def test_states_that_are_replaced_are_used():
    optimizers = [make(kind, make_parameters()) for kind in KINDS]
    for optimizer in optimizers:
        run(optimizer)
        state = optimizer.state[optimizer.param_groups[0]["params"][1]]
        state["step"] = torch.tensor(70.0)
        state["exp_avg"] = torch.ones(3)
        run(optimizer)
        optimizer.state.clear()
        run(optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        run(optimizer)
    assert_same(*optimizers)
    assert packs(optimizers[0])


def test_one_addition_counts_all_steps():
    optimizer = make(PackedAdamW, make_parameters())
    run(optimizer, steps=2)
    with torch.profiler.profile() as profile:
        run(optimizer, steps=1)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::add_"] == counts["aten::_fused_adamw_"] == 2  # groups
    assert "aten::_foreach_add_" not in counts
