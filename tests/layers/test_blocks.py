"""Blocks that run as one operator, against the modules that define them."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from psf.layers import blocks, native
from psf.layers.blocks import (
    deformable_attention_block,
    feed_forward_block,
    self_attention_block,
)
from psf.layers.linear import ConvolutionalLinear
from psf.layers.ms_deform_attn import MSDeformAttn, has_extension
from psf.layers.transformer import FeedForward
from psf.modeling import mask_decoder
from psf.modeling.mask_decoder import MaskDecoderLayer
from psf.modeling.pixel_encoder import EncoderLayer

pytestmark = pytest.mark.skipif(not has_extension(), reason="needs the extension")

SHAPES = [(4, 3), (2, 2)]
POSITIONS = sum(h * w for h, w in SHAPES)

OPERATORS = (
    *("feed_forward_block", "self_attention_block"),
    *("deformable_attention_block", "cross_attention_block"),
)


class Case(NamedTuple):
    """A block, and what it is given."""

    modules: nn.ModuleDict
    tensors: dict[str, Tensor]
    call: Callable[[nn.ModuleDict, dict[str, Tensor]], Any]  # a tensor or several


def feed_forward(
    *, size=(2, 7, 15), hidden_dim=21, activation: Callable[..., nn.Module] = nn.ReLU, dropout=0.0
) -> Case:
    dim = size[-1]
    ffn = FeedForward(dim=dim, hidden_dim=hidden_dim, dropout=dropout, activation=activation)
    modules = nn.ModuleDict({"ffn": ffn, "norm": nn.LayerNorm(dim)})
    return Case(
        drawn(modules),
        {"x": torch.randn(size)},
        lambda m, t: feed_forward_block(t["x"], m["ffn"], m["norm"]),
    )


def self_attention(*, size=(2, 7, 15), position=None, dropout=0.0, **options: Any) -> Case:
    """``position``: of its own for every image, or one for all."""
    dim = size[-1]
    attention = nn.MultiheadAttention(dim, 3, batch_first=True, **options)
    modules = nn.ModuleDict({"attention": attention, "norm": nn.LayerNorm(dim)})
    modules["dropout"] = nn.Dropout(dropout)
    tensors = {"x": torch.randn(size)}
    if position is not None:
        tensors["position"] = drawn_position(size, position)
    return Case(
        drawn(modules),
        tensors,
        lambda m, t: self_attention_block(
            t["x"], t.get("position"), m["attention"], m["dropout"], m["norm"]
        ),
    )


def deformable_attention(
    *, size=(2, 7, 15), position="own", box=False, masked=False, shapes=SHAPES, dropout=0.0
) -> Case:
    images, queries, dim = size
    attention = MSDeformAttn(dim=dim, num_levels=len(shapes), num_heads=3, num_points=2)
    modules = nn.ModuleDict({"attention": attention, "norm": nn.LayerNorm(dim)})
    modules["dropout"] = nn.Dropout(dropout)
    positions = sum(h * w for h, w in shapes)
    tensors = {
        "x": torch.randn(size),
        "position": drawn_position(size, position),
        "references": torch.rand(images, queries, len(shapes), 4 if box else 2),
        "features": torch.randn(images, positions, dim),
    }
    mask = torch.rand(images, positions) < 0.3 if masked else None
    return Case(
        drawn(modules),
        tensors,
        lambda m, t: deformable_attention_block(
            *(t["x"], t["position"], t["references"], t["features"]),
            *(shapes, mask, m["attention"], m["dropout"], m["norm"]),
        ),
    )


def encoder(*, size=(2, POSITIONS, 15), masked=True) -> Case:
    """The features attend to themselves."""
    case = deformable_attention(size=size, position="one", masked=masked)
    del case.tensors["features"]
    return case._replace(call=lambda m, t: case.call(m, {**t, "features": t["x"]}))


def cross_attention(*, size=(2, 7, 15), positions=11, masked=False, used=(0, 1, 2)) -> Case:
    """``used``: of the queries, and of their and the features' projections."""
    images, _, dim = size
    layer = MaskDecoderLayer(dim=dim, num_heads=3, num_levels=1, feedforward_dim=21)
    mask = None
    if masked:
        mask = torch.rand(images, positions) < 0.3
        mask[:, 0] = False

    def call(modules: nn.ModuleDict, tensors: dict[str, Tensor]) -> list[Tensor]:
        query, projections = modules["layer"].refine(tensors["x"], tensors["features"], mask)
        return [(query, *projections)[i] for i in used]

    tensors = {"x": torch.randn(size), "features": torch.randn(images, positions, dim)}
    return Case(drawn(nn.ModuleDict({"layer": layer})), tensors, call)


def drawn_position(size: tuple[int, int, int], kind: str) -> Tensor:
    return torch.randn(size[0] if kind == "own" else 1, *size[1:])


def drawn(modules: nn.ModuleDict) -> nn.ModuleDict:
    """With parameters none of which is 0 or 1."""
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.4)
    return modules


CASES: dict[str, Callable[..., Case]] = {
    "ReLU": feed_forward,
    "GELU": functools.partial(feed_forward, activation=nn.GELU),
    "self": self_attention,
    "self with position": functools.partial(self_attention, position="own"),
    "self with one position": functools.partial(self_attention, position="one"),
    "points": deformable_attention,
    "points, one position": functools.partial(deformable_attention, position="one"),
    "points, padding": functools.partial(deformable_attention, masked=True),
    "boxes": functools.partial(deformable_attention, box=True),
    "boxes, padding": functools.partial(deformable_attention, box=True, masked=True),
    "encoder": encoder,
    "cross": cross_attention,
    "cross, padding": functools.partial(cross_attention, masked=True),
}

# One of each operator.
FEW_CASES = ["GELU", "self with one position", "boxes, padding", "cross, padding"]

every_case = pytest.mark.parametrize("name", CASES)
every_operator = pytest.mark.parametrize("name", FEW_CASES)


@contextmanager
def by_modules() -> Iterator[None]:
    """No block runs as one operator."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, mask_decoder):
            patch.setattr(module, "runs_as_one", lambda *_: False)
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the operators that were called."""
    names: list[str] = []

    def spy(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            names.append(name)
            return operator(*args)

        return call

    for name in OPERATORS:
        packet = getattr(torch.ops.psf, name)
        monkeypatch.setattr(packet, "default", spy(name, packet.default))
    return names


def outputs_of(case: Case) -> list[Tensor]:
    outputs = case.call(case.modules, case.tensors)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def results(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs and all gradients, of random gradients of the outputs; a missing one is zeros."""
    return raw_results(
        case._replace(
            modules=copy.deepcopy(case.modules).to(dtype),
            tensors={name: leaf(x, dtype) for name, x in case.tensors.items()},
        )
    )


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_()


def raw_results(case: Case) -> dict[str, Tensor]:
    """:func:`results` of the case as it is, of what has gradients."""
    outputs = outputs_of(case)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = {
        name: x
        for name, x in [*case.tensors.items(), *case.modules.named_parameters()]
        if x.requires_grad
    }
    found = torch.autograd.grad(
        outputs, list(wanted.values()), grads, allow_unused=True, materialize_grads=True
    )
    return {
        **{f"output {i}": x.detach() for i, x in enumerate(outputs)},
        **dict(zip(wanted, found, strict=True)),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=error * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_as_modules(case: Case, error: float = 1e-12, of: Callable = results) -> None:
    found = of(case)
    with by_modules():
        expected = of(case)
    assert_same(found, expected, error)


@pytest.mark.parametrize("dim", [3, 15, 48])
@every_case
def test_is_what_its_modules_compute(name, dim, calls):
    """Values, and gradients of all that is given and of all parameters."""
    size = (2, POSITIONS if name == "encoder" else 7, dim)
    case = CASES[name](size=size)
    assert_same_as_modules(case)
    assert calls


@every_operator
def test_many_rows(name):
    """More than a task of the normalisation has, which is 128."""
    assert_same_as_modules(CASES[name](size=(2, 150, 12)))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_some_outputs_of_the_cross_attention(used):
    assert_same_as_modules(cross_attention(masked=True, used=used))


@every_case
def test_single_precision(name):
    """Errors at most twice those of the modules, or of a few units in the last place."""
    size = (2, POSITIONS if name == "encoder" else 40, 36)
    case = CASES[name](size=size)
    exact, found = results(case), results(case, torch.float32)
    with by_modules():
        expected = results(case, torch.float32)
    for key, x in exact.items():
        error = (found[key] - x).norm()
        allowed = 2 * (expected[key] - x).norm() + 1e-7 * x.norm()
        assert error <= allowed + 1e-7, key


@every_case
def test_no_memory_order_matters(name):
    """Neither that of what is given nor that of gradients and parameters."""
    case = CASES[name]()
    apart = {key: x.transpose(-2, -1).contiguous().mT for key, x in case.tensors.items()}
    assert not apart["x"].is_contiguous()
    for module in case.modules.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            data = torch.stack([parameter.data, parameter.data], -1).double()[..., 0]
            assert not data.is_contiguous() or data.numel() == 1
            setattr(module, key, nn.Parameter(data))

    def strided(case: Case) -> dict[str, Tensor]:
        outputs = [x.mT for x in outputs_of(case)]  # gradients come in transposed
        leaves = [*case.tensors.values(), *case.modules.parameters()]
        grads = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        found = torch.autograd.grad(
            outputs, leaves, grads, allow_unused=True, materialize_grads=True
        )
        return {str(i): x for i, x in enumerate((*outputs, *found))}

    tensors = {key: leaf(x, torch.float64) for key, x in apart.items()}
    assert not tensors["x"].is_contiguous()
    assert_same_as_modules(case._replace(tensors=tensors), of=strided)


@every_operator
def test_an_expanded_gradient(name):
    """As of a sum."""
    case = CASES[name]()

    def summed(case: Case) -> dict[str, Tensor]:
        total = sum(x.square().sum() + x.sum() for x in outputs_of(case))
        parameters = dict(case.modules.named_parameters())
        found = torch.autograd.grad(
            total, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, found, strict=True))

    case = case._replace(
        modules=case.modules.double(), tensors={k: x.double() for k, x in case.tensors.items()}
    )
    assert_same_as_modules(case, of=summed)


def frozen(case: Case, is_frozen: Callable[[int], bool]) -> Case:
    case = case._replace(
        modules=case.modules.double(),
        tensors={key: leaf(x, torch.float64) for key, x in case.tensors.items()},
    )
    for i, x in enumerate([*case.tensors.values(), *case.modules.parameters()]):
        x.requires_grad_(not is_frozen(i))
    return case


@pytest.mark.parametrize("start", [0, 1])
@every_case
def test_every_second_leaf_is_frozen(name, start):
    case = frozen(CASES[name](), lambda i: i % 2 == start)
    assert_same_as_modules(case, of=raw_results)


@every_case
def test_all_parameters_are_frozen(name, calls):
    case = CASES[name]()
    num_tensors = len(case.tensors)
    assert_same_as_modules(frozen(case, lambda i: i >= num_tensors), of=raw_results)
    assert calls
    everything = frozen(case, lambda i: True)
    assert not any(x.requires_grad for x in outputs_of(everything))


@pytest.mark.parametrize("size", [(0, 7, 15), (2, 0, 15)])
@every_case
def test_empty(name, size, calls):
    """No image, no query."""
    if name == "encoder":
        size = (0, POSITIONS, 15)
    assert_same_as_modules(CASES[name](size=size))
    assert calls


def test_no_feature(calls):
    assert_same_as_modules(deformable_attention(shapes=[(0, 3), (2, 0)], masked=True))
    assert_same_as_modules(cross_attention(positions=0))
    assert set(calls) == {
        *("deformable_attention_block", "cross_attention_block", "feed_forward_block")
    }


def test_an_image_that_is_all_padding():
    """Its queries attend to nothing."""
    case = cross_attention()
    mask = torch.tensor([True, False])[:, None].expand(2, 11)
    call = lambda m, t: m["layer"].refine(t["x"], t["features"], mask).query  # noqa: E731
    assert_same_as_modules(case._replace(call=call))


def with_threads(case: Case, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The results with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(case, dtype))
    finally:
        torch.set_num_threads(threads)
    return found


@every_operator
def test_several_threads(name):
    one, *others = with_threads(CASES[name](size=(2, 300, 24)), torch.float64)
    for other in others:
        assert_same(other, one, 1e-12)


def test_threads_do_not_change_the_normalisation():
    """Not a bit. The products of MKL, which they do change, are 0 here."""
    case = feed_forward(size=(2, 300, 24), activation=nn.GELU)
    nn.init.zeros_(case.modules["ffn"][3].weight)
    one, *others = with_threads(case, torch.float32)
    for key in ("output 0", "x", "norm.weight", "norm.bias", "ffn.3.bias"):
        assert one[key].any()
        assert all(torch.equal(one[key], other[key]) for other in others), key


def with_convolutions(case: Case) -> Case:
    modules = copy.deepcopy(case.modules)
    for parent in list(modules.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, key, ConvolutionalLinear(child))
    return case._replace(modules=modules)


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [511, 512, 700])
@pytest.mark.parametrize("name", ["ReLU", "GELU", "boxes, padding", "cross, padding"])
def test_convolutions(name, rows, dtype, mkldnn, calls):
    """They are another order of the same sums."""
    options = {"positions": rows} if name.startswith("cross") else {}
    case = CASES[name](size=(1, rows, 12), **options)
    convolving = with_convolutions(case)
    assert any(isinstance(m, ConvolutionalLinear) for m in convolving.modules.modules())
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        found = results(convolving, dtype)
    assert calls
    error = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(found, {key: x.to(dtype) for key, x in results(case).items()}, error)


# ---- when modules run themselves ----------------------------------------------------------------


def add_to(calls: list, name: str) -> Callable[..., None]:
    return lambda *_: calls.append(name)


HOOKS = (
    *("register_forward_hook", "register_forward_pre_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook"),
)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(("ReLU", path) for path in ("ffn", "ffn.0", "ffn.1", "ffn.2", "ffn.3", "ffn.4", "norm")),
        *(("self", path) for path in ("attention", "dropout", "norm")),
        *(("points", path) for path in ("attention", "dropout", "norm")),
        ("points", "attention.sampling_offsets"),
        ("points", "attention.attention_weights"),
        ("points", "attention.value_proj"),
        ("points", "attention.output_proj"),
        ("cross", "layer.cross_attn"),
        ("cross", "layer.norm1"),
        *(("cross", f"layer.cross_attn.{x}_proj") for x in ("q", "k", "v", "out")),
    ],
)
def test_hooks_run(name, path, register, calls):
    case = CASES[name]()
    expected = results(case)
    seen: list[str] = []
    calls.clear()
    getattr(case.modules.get_submodule(path), register)(add_to(seen, path))
    assert_same(results(case), expected, 1e-12)
    assert seen
    # What follows the cross-attention is a block of its own.
    assert calls == (["feed_forward_block"] if name == "cross" else [])


@pytest.mark.parametrize(
    "register",
    [
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_full_backward_hook,
        global_hooks.register_module_full_backward_pre_hook,
    ],
)
@every_operator
def test_hooks_of_all_modules_run(name, register, calls):
    case = CASES[name]()
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        results(case)
    finally:
        handle.remove()
    assert "LayerNorm" in seen
    if name.startswith("self"):
        assert "MultiheadAttention" in seen
    assert not calls


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class DoubledAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **options: Any) -> Any:
        attended, weights = super().forward(*args, **options)
        return 2 * attended, weights


@pytest.mark.parametrize(
    ("name", "path", "module"),
    [
        ("ReLU", "ffn.0", Doubled(15, 21)),
        ("ReLU", "ffn.3", Doubled(21, 15)),
        ("ReLU", "ffn.1", nn.SiLU()),
        ("ReLU", "ffn.1", nn.GELU(approximate="tanh")),
        ("ReLU", "ffn.4", DoubledDropout(0.0)),
        ("ReLU", "norm", DoubledNorm(15)),
        ("self", "attention", DoubledAttention(15, 3, batch_first=True)),
        ("self", "attention", nn.MultiheadAttention(15, 3, batch_first=True, bias=False)),
        ("self", "attention", nn.MultiheadAttention(15, 3, batch_first=True, add_bias_kv=True)),
        ("self", "attention", nn.MultiheadAttention(15, 3, batch_first=True, add_zero_attn=True)),
        ("self", "dropout", DoubledDropout(0.0)),
        ("points", "attention.sampling_offsets", Doubled(15, 24)),
        ("points", "attention.value_proj", nn.Linear(15, 15, bias=False)),
        ("points", "norm", nn.LayerNorm(15, elementwise_affine=False)),
        ("cross", "layer.cross_attn.k_proj", Doubled(15, 15)),
        ("cross", "layer.cross_attn.k_proj", nn.Linear(15, 15, bias=False)),
        ("cross", "layer.norm1", nn.LayerNorm(15, bias=False)),
        ("ReLU", "ffn.0", nn.Linear(15, 21, bias=False)),
        ("ReLU", "ffn.0", ConvolutionalLinear(nn.Linear(15, 21, bias=False))),
        ("ReLU", "norm", nn.LayerNorm(15, elementwise_affine=False)),
        ("ReLU", "norm", nn.LayerNorm(15, bias=False)),
        ("ReLU", "norm", nn.LayerNorm((7, 15))),
    ],
)
def test_other_modules_run_themselves(name, path, module, calls):
    case = CASES[name]()
    parent, _, key = path.rpartition(".")
    setattr(case.modules.get_submodule(parent), key, module)
    case = case._replace(modules=case.modules.double())
    found = outputs_of(case._replace(tensors={k: x.double() for k, x in case.tensors.items()}))
    x = {k: x.double() for k, x in case.tensors.items()}
    assert_same({"output": found[0]}, {"output": first_definition(name, case.modules, x)}, 1e-12)
    assert calls == (["feed_forward_block"] if name == "cross" else [])


def first_definition(name: str, m: nn.ModuleDict, t: dict[str, Tensor]) -> Tensor:
    """The first output, by calls of modules alone."""
    x = t["x"]
    if name == "ReLU":
        return m["norm"](x + m["ffn"](x))
    if name == "self":
        return m["norm"](x + m["dropout"](m["attention"](x, x, x)[0]))
    if name == "points":
        attended = m["attention"](x + t["position"], t["references"], t["features"], SHAPES)
        return m["norm"](x + attended)
    layer = m["layer"]
    query = layer.norm1(x + layer.cross_attn(x, t["features"], None).query)
    return layer.norm2(query + layer.ffn(query))


def test_other_sizes_of_keys_and_values():
    """Self-attention has none: as by the module itself."""
    case = self_attention(kdim=15, vdim=9)
    with pytest.raises((AssertionError, RuntimeError)):
        outputs_of(case)


@pytest.mark.parametrize("path", ["ffn.0", "ffn.3"])
def test_computed_weights(path, calls):
    """Of parametrisations, weight norm and pruning."""
    reference = feed_forward()
    for change in (
        parametrizations.weight_norm,
        functools.partial(prune.l1_unstructured, name="weight", amount=0.5),
    ):
        case = reference._replace(modules=copy.deepcopy(reference.modules))
        linear = case.modules.get_submodule(path)
        change(linear)
        with torch.no_grad():  # what is computed now is not what it was
            for parameter in linear.parameters():
                parameter.mul_(2)
        output, x = outputs_of(case)[0], case.tensors["x"]
        torch.testing.assert_close(output, case.modules["norm"](x + case.modules["ffn"](x)))
        assert output.grad_fn is not None
    assert not calls


def test_forward_of_an_instance(calls):
    case = feed_forward()
    case.modules["ffn"][0].forward = lambda x: x.new_zeros(*x.shape[:-1], 21)
    x = case.tensors["x"]
    expected = case.modules["norm"](x + case.modules["ffn"](x))
    torch.testing.assert_close(outputs_of(case)[0], expected)
    assert not calls


@pytest.mark.parametrize("build", [feed_forward, self_attention, deformable_attention])
def test_dropout(build, calls):
    """At work it is the modules'; in evaluation it is nothing, also with gradients."""
    case = build(dropout=0.5)
    first, second = outputs_of(case)[0], outputs_of(case)[0]
    assert not torch.equal(first, second)
    assert not calls
    case.modules.eval()
    assert_same_as_modules(case)
    assert len(calls) == 1


def test_dropout_of_attention_weights(calls):
    """The module's own."""
    case = self_attention()
    case.modules["attention"].dropout = 0.5
    assert not torch.equal(outputs_of(case)[0], outputs_of(case)[0])
    assert not calls
    case.modules.eval()
    outputs_of(case)
    assert calls


@every_operator
def test_where_no_block_runs(name, calls, monkeypatch):
    """Without gradients, under autocast, in half precision, without the extension."""
    case = CASES[name]()
    expected = outputs_of(case)[0].detach()
    assert calls
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(case)[0], expected)
    with torch.inference_mode():
        torch.testing.assert_close(outputs_of(case)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs_of(case)[0].float(), expected, rtol=0, atol=0.1)
    half = case._replace(
        modules=copy.deepcopy(case.modules).bfloat16(),
        tensors={
            key: x if key == "references" else x.bfloat16() for key, x in case.tensors.items()
        },
    )
    assert outputs_of(half)[0].dtype == torch.bfloat16
    monkeypatch.setattr(native, "has_extension", lambda: False)
    torch.testing.assert_close(outputs_of(case)[0], expected)
    assert not calls


# ---- what surrounds a block ---------------------------------------------------------------------


@every_operator
def test_second_derivatives_are_refused(name):
    case = CASES[name]()
    x = case.tensors["x"].requires_grad_()
    # The projected queries, which go through no other block.
    output = outputs_of(case)[1 if name.startswith("cross") else 0]
    with pytest.raises(RuntimeError, match="second derivatives of transformer blocks"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@every_operator
def test_a_changed_input_is_noticed(name):
    """What is overwritten after it was used would give a wrong gradient."""
    case = CASES[name]()
    # Of the deformable attention's queries nothing is needed again.
    overwritten = {"x", "features"} if not name.startswith("boxes") else {"features"}
    for key in overwritten & case.tensors.keys():
        output = outputs_of(case)[0]
        case.tensors[key].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@every_operator
def test_recomputation(name, calls):
    """Activation checkpointing runs the block twice, to the same gradients."""
    case = CASES[name]()
    again = case._replace(
        call=lambda m, t: checkpoint(case.call, m, t, use_reentrant=False, preserve_rng_state=False)
    )
    assert_same(results(again), results(case), 0.0)
    assert calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, calls):
    """Traced, modules run themselves."""
    layer = EncoderLayer(
        dim=12, num_levels=2, num_heads=3, num_points=2, feedforward_dim=20, dropout=0.0
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    tensors = {
        "x": torch.randn(2, POSITIONS, 12),
        "position": torch.randn(1, POSITIONS, 12),
        "references": torch.rand(2, POSITIONS, 2, 2),
    }

    def case_of(run: Callable[..., Tensor]) -> Case:
        return Case(
            nn.ModuleDict({"layer": layer}),
            {key: x.clone().requires_grad_() for key, x in tensors.items()},
            lambda m, t: run(t["x"], t["position"], t["references"], SHAPES, None),
        )

    found = raw_results(case_of(torch.compile(layer, backend=backend, fullgraph=True)))
    assert not calls
    assert_same(found, raw_results(case_of(layer)), 1e-4)
    assert calls


@pytest.mark.parametrize("name", ["GELU", "self with one position", "cross, padding"])
def test_exported(name, calls):
    case = CASES[name]()
    keys = list(case.tensors)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = case.modules

        def forward(self, *tensors: Tensor) -> list[Tensor]:
            outputs = case.call(self.parts, dict(zip(keys, tensors, strict=True)))
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    block, tensors = Block(), tuple(case.tensors.values())
    program = torch.export.export(block, tensors, strict=False)
    assert not calls
    for x, y in zip(program.module()(*tensors), block(*tensors), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(1, 11, 15)}, "query must be .* and features"),
        ({"features": torch.randn(2, 12, 15)}, "visible must be"),
    ],
)
def test_sizes_that_do_not_match(change, message):
    case = cross_attention(masked=True)
    with pytest.raises(RuntimeError, match=message):
        outputs_of(case._replace(tensors={**case.tensors, **change}))
