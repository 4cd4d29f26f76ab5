"""Every CUDA kernel on small inputs, against plain PyTorch: what compute-sanitizer watches."""

import itertools

import torch

from psf.layers import ms_deform_attn_reference

SHAPES = [(9, 13), (5, 7), (1, 1)]  # sizes that no tile divides
SIZES = list(itertools.chain(*SHAPES))
# Largest error of the norm, by the type of the value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(name, actual, expected, dtype):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], (name, dtype, error.item())


def check_case(dtype, channels, queries):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda", "dtype": torch.float64}
    wide = torch.promote_types(dtype, torch.float32)
    positions = sum(h * w for h, w in SHAPES)
    grid = (2, queries or positions, 4, len(SHAPES), 3)
    value = torch.randn(2, positions, 4, channels, **draw).to(dtype)
    sides = torch.tensor(SHAPES, device="cuda").flip(-1)[:, None]
    pixels = (1.4 * torch.rand(*grid, 2, **draw) - 0.2) * sides - 0.5
    pixels = (8 * pixels).floor() / 8 + 1 / 16  # derivatives jump at pixel centres
    locations = ((pixels + 0.5) / sides).to(wide)
    weights = torch.rand(*grid, **draw).to(wide)
    grad = torch.randn(*grid[:2], 4 * channels, **draw).to(dtype)

    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    exact = ms_deform_attn_reference(leaves[0], SHAPES, *leaves[1:])
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    ops = torch.ops.psf
    inputs = (value, SIZES, locations, weights)
    check("output", ops.ms_deform_attn(*inputs), exact, dtype)
    mask = [True, True, True]
    ways = {
        "scattered": ops.ms_deform_attn_backward(grad, *inputs, mask, False),
        "deterministic": ops.ms_deform_attn_backward(grad, *inputs, mask, True),
    }
    for way, grads in ways.items():
        for part, actual, expected in zip(
            ("value", "locations", "weights"), grads, exact_grads, strict=True
        ):
            check(f"{way} {part}", actual, expected, dtype)
    check_fused(inputs, grad, dtype)


def check_fused(inputs, grad, dtype):
    """The fused operator against the unfused one, which has just been checked."""
    value, sizes, locations, weights = inputs
    shapes = locations.new_tensor(SHAPES).flip(-1)
    softmax = weights.flatten(3).softmax(-1).view_as(weights)
    for coordinates in (2, 4):
        references = torch.rand(*locations.shape[:2], len(SHAPES), coordinates).to(locations)
        around = references[:, :, None, :, None]
        unit = 1 / shapes[:, None] if coordinates == 2 else around[..., 2:] * 0.5 / 3
        offsets = (locations - around[..., :2]) / unit
        fused = (value, sizes, references, offsets.contiguous(), weights)
        same = (value, sizes, around[..., :2] + offsets * unit, softmax)
        expected = torch.ops.psf.ms_deform_attn(*same)
        check("fused output", torch.ops.psf.ms_deform_attn_fused(*fused), expected.double(), dtype)
        mask, by_value = [True] * 4, [True, False, False]
        expected = torch.ops.psf.ms_deform_attn_backward(grad, *same, by_value, False)[0].double()
        for deterministic in (False, True):
            grads = torch.ops.psf.ms_deform_attn_fused_backward(grad, *fused, mask, deterministic)
            check("fused value", grads[0], expected, dtype)
            assert all(g.isfinite().all() for g in grads)


def main():
    for dtype, channels, queries in itertools.product(TOLERANCE, (3, 16, 32, 64), (None, 37)):
        check_case(dtype, channels, queries)
    torch.cuda.synchronize()
    print("all kernels agree with plain PyTorch")


if __name__ == "__main__":
    main()
