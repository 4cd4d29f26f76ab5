"""What runs as an operator of the extension on a CPU, and what is left to plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from psf.layers import native
from psf.layers.native import has_cpu_kernels, is_hooked


class Subclass(torch.Tensor):
    pass


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(native, "has_extension", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_tensors_of_one_floating_type_run(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    assert has_cpu_kernels(x, nn.Parameter(x), x.t())


@pytest.mark.parametrize(
    "others",
    [
        [torch.zeros(2).double()],
        [torch.zeros(2, device="meta")],
        [torch.eye(2).to_sparse()],
        [torch.zeros(2).as_subclass(Subclass)],
    ],
    ids=["mixed", "meta", "sparse", "subclass"],
)
def test_others_do_not(others):
    assert not has_cpu_kernels(torch.zeros(2), *others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_types_do_not(dtype):
    assert not has_cpu_kernels(torch.zeros(2, dtype=dtype))


def test_without_extension_nothing_runs(monkeypatch):
    monkeypatch.setattr(native, "has_extension", lambda: False)
    assert not has_cpu_kernels(torch.zeros(2))


def test_compiled_or_traced_nothing_runs(monkeypatch):
    answers = []

    def traced(x):
        answers.append(has_cpu_kernels(x))
        return x + 1

    torch.jit.trace(traced, torch.zeros(2), check_trace=False)
    assert answers == [False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not has_cpu_kernels(torch.zeros(2))


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
        lambda _: global_hooks.register_module_forward_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre", "global"],
)
def test_hooks_are_seen_until_they_go(register):
    module = nn.Linear(2, 2)
    assert not is_hooked(module)
    handle = register(module)
    try:
        assert is_hooked(module)
    finally:
        handle.remove()
    assert not is_hooked(module)


def test_a_forward_of_its_own_is_seen():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert is_hooked(module)
