"""The backward on CUDA with each way to add up the value gradient: time and error.

``scattered`` adds every sample to every pixel with atomics, ``by_pixel`` sorts the samples of a
tile of queries first, ``deterministic`` adds in fixed point. Which of the first two wins depends on
the device's rate of atomics and on how near to each other neighbouring queries sample.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

# A picture of 800 x 1333 pixels at strides 8 to 64, as in the encoder.
SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
SIZES = list(itertools.chain(*SHAPES))
HEADS, POINTS = 8, 4
REPEATS = 50


def make_inputs(images, queries, channels, dtype, spread):
    """spread: standard deviation, in pixels, of samples around their query; None: uniform."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda"}
    positions = sum(h * w for h, w in SHAPES)
    centres = torch.cat(
        [
            torch.stack(
                torch.meshgrid(
                    (torch.arange(h, device="cuda") + 0.5) / h,
                    (torch.arange(w, device="cuda") + 0.5) / w,
                    indexing="ij",
                ),
                dim=-1,
            ).flatten(0, 1)
            for h, w in SHAPES
        ]
    ).flip(-1)  # (S, 2)
    if queries is not None:
        centres = torch.rand(queries, 2, **draw)
    grid = (images, len(centres), HEADS, len(SHAPES), POINTS)
    if spread is None:
        locations = torch.rand(*grid, 2, **draw)
    else:
        sides = torch.tensor(SHAPES, device="cuda").flip(-1)[:, None]
        locations = centres[:, None, None, None] + spread * torch.randn(*grid, 2, **draw) / sides
    value = torch.randn(images, positions, HEADS, channels, **draw).to(dtype)
    weights = torch.rand(*grid, **draw).to(dtype)
    grad = torch.randn(images, len(centres), HEADS * channels, **draw).to(dtype)
    return grad, value, SIZES, locations, weights


def milliseconds(function):
    """Median of REPEATS runs, each in a CUDA graph so that the host does not count."""
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON file")
    output = parser.parse_args().output
    ops, mask = torch.ops.psf, [True, True, True]
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds")
    cells = itertools.product(
        (1, 2), (None, 300), (32, 64), (torch.float32, torch.bfloat16), (1.5, 4.0, None)
    )
    for images, queries, channels, dtype, spread in cells:
        args = make_inputs(images, queries, channels, dtype, spread)
        exact = ops.ms_deform_attn_backward(
            *(t.double() if isinstance(t, torch.Tensor) else t for t in args), [True, False, False]
        )[0]
        ways = {
            "scattered": lambda a=args: ops.ms_deform_attn_backward(*a, mask),
            "by_pixel": lambda a=args: ops._ms_deform_attn_backward_by_pixel(*a, mask),
            "deterministic": lambda a=args: ops.ms_deform_attn_backward(
                *a, mask, deterministic=True
            ),
        }
        row = {
            **{"images": images, "queries": queries or exact.shape[1], "channels": channels},
            **{"dtype": str(dtype).removeprefix("torch."), "spread": spread},
            "milliseconds": {name: milliseconds(way) for name, way in ways.items()},
            "error": {
                name: ((way()[0].double() - exact).norm() / exact.norm()).item()
                for name, way in ways.items()
            },
        }
        rows.append(row)
        print(row)
    device = torch.cuda.get_device_name()
    name = f"cuda_value_gradient-{device.replace(' ', '-')}.json"
    document = {"device": device, "torch": torch.__version__, "rows": rows}
    output.joinpath(name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
