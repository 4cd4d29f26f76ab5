#!/usr/bin/env python3
"""Multi-scale deformable attention: this project's kernels against whatever else is installed.

python benchmarks/ms_deform_attn.py                       # CPU, prints a table
python benchmarks/ms_deform_attn.py --device cuda --output benchmarks/results

Peers are used when they import: torch-ms-deform-attn, deformops, mmcv, transformers. Every round
runs all implementations of a case in turn, so that whatever else the machine does meets them alike,
and each once untimed before it is timed, since the memory and caches that another left behind are
not its own. Figures are medians over the rounds, ratios are medians of the rounds' own ratios. On a
CPU a figure is the processor time of all threads, which other programs disturb least, with the wall
time beside it; on a GPU it is the time between events around a batch of calls.

On a CPU freed memory is kept for the next call, as in this project's training: else the C library
returns outputs of megabytes to the system, depending on what ran before, and whoever comes next
waits for thousands of page faults (--fresh-memory).

PSF_CPU_CAPABILITY=avx2 limits this project's kernels to an instruction set.
"""

import argparse
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psf.layers import (
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)
from psf.layers.host_memory import keep_freed_memory
from psf.layers.ms_deform_attn import has_extension

# An image of 800 x 1333 pixels at strides 8 to 64.
SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
HEADS, CHANNELS, POINTS = 8, 32, 4
# How far trained offsets scatter around their directions, in pixels.
SPREAD = 1.5

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """One set of inputs."""

    name: str
    images: int
    queries: int | None  # None: one query a pixel, as in the encoder
    dtype: torch.dtype
    random: bool = False  # locations anywhere instead of around the query


class Inputs(NamedTuple):
    """Value (N, S, M, D), what the plain operator and what the fused one takes."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random features; locations as a trained model's: around the query, or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    positions = sum(h * w for h, w in SHAPES)
    if case.queries is None:
        points = []
        for h, w in SHAPES:
            y, x = torch.meshgrid(
                (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"
            )
            points.append(torch.stack([x, y], -1).view(-1, 2))
        centres = torch.cat(points)
    else:
        centres = torch.rand(case.queries, 2, generator=generator)
    shape = (case.images, len(centres), HEADS, len(SHAPES), POINTS)
    angles = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions /= directions.abs().amax(-1, keepdim=True)
    distances = torch.arange(1, POINTS + 1)[:, None]
    offsets = directions[:, None, None] * distances + SPREAD * torch.randn(
        *shape, 2, generator=generator
    )
    sizes = torch.tensor(SHAPES).flip(-1)[:, None]
    reference = centres[None, :, None].expand(case.images, -1, len(SHAPES), 2).contiguous()
    if case.random:
        target = torch.rand(*shape, 2, generator=generator)
        offsets = (target - reference[:, :, None, :, None]) * sizes
    # A quarter pixel off the knots, where the derivative jumps and rounding decides the side.
    pixels = reference[:, :, None, :, None] * sizes - 0.5 + offsets
    offsets += (pixels.floor() + (pixels - pixels.floor()).clamp(0.25, 0.75)) - pixels
    locations = reference[:, :, None, :, None] + offsets / sizes
    logits = torch.randn(*shape[:3], len(SHAPES) * POINTS, generator=generator).view(shape)
    weights = logits.flatten(3).softmax(-1).view(shape)
    value = torch.randn(case.images, positions, HEADS, CHANNELS, generator=generator)
    tensors = (value.to(case.dtype), locations, weights, reference, offsets, logits)
    return Inputs(*(tensor.to(device) for tensor in tensors))


# ---- implementations -----------------------------------------------------------------------------


def implementations(device: str) -> dict[str, Op]:
    """By name, those that import; this project's first."""
    _tensors(device)  # made outside inference mode, for all
    found: dict[str, Op] = {"psf": lambda v, x, w: ms_deform_attn(v, SHAPES, x, w)}
    for name, build in PEERS.items():
        op = build(device)
        if op is not None:
            found[name] = op
    found["plain PyTorch"] = lambda v, x, w: ms_deform_attn_reference(v, SHAPES, x, w)
    return found


def _module(name: str) -> Any:
    """The module, or None where it (or what it needs) is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@functools.cache
def _tensors(device: str) -> tuple[Tensor, Tensor]:
    """Deformable DETR's spatial_shapes and level_start_index."""
    shapes = torch.tensor(SHAPES, device=device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return shapes, starts


def _torch_ms_deform_attn(device: str) -> Op | None:
    module = _module("torch_ms_deform_attn")
    if module is None:
        return None
    return lambda v, x, w: module.ms_deform_attn(v, *_tensors(device), x, w)


def _deformops(device: str) -> Op | None:
    module = _module("deformops")
    if module is None:
        return None
    return lambda v, x, w: module.ms_deform_attn(v, *_tensors(device), x, w)


def _mmcv(device: str) -> Op | None:
    module = _module("mmcv.ops.multi_scale_deform_attn")
    if module is None:
        return None
    if device == "cpu":
        return lambda v, x, w: module.multi_scale_deformable_attn_pytorch(
            v, _tensors(device)[0], x, w
        )
    apply = module.MultiScaleDeformableAttnFunction.apply
    return lambda v, x, w: apply(v, *_tensors(device), x, w, 64)


def _transformers(device: str) -> Op | None:
    module = _module("transformers.models.deformable_detr.modeling_deformable_detr")
    if module is None:
        return None
    layer = module.MultiScaleDeformableAttention()
    return lambda v, x, w: layer(v, _tensors(device)[0], SHAPES, _tensors(device)[1], x, w, 64)


PEERS = {
    "torch-ms-deform-attn": _torch_ms_deform_attn,
    "deformops": _deformops,
    "mmcv": _mmcv,
    "transformers": _transformers,
}


# ---- measuring -----------------------------------------------------------------------------------


class Run(NamedTuple):
    """One thing to time: without gradients, or with."""

    call: Callable[[], Any]
    outputs: Callable[[], list[Tensor]]  # output and gradients, for the error


def make_run(op: Op, tensors: list[Tensor], backward: bool) -> Run:
    """
    Args:
        op: of the tensors.
        tensors: its inputs.
        backward: time forward and backward, with the gradients of all inputs.
    """
    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return op(*tensors)

        return Run(forward, lambda: [forward()])
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    grad = torch.randn(
        op(*tensors).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32
    ).to(tensors[0])

    def both() -> list[Tensor]:
        output = op(*leaves)
        grads = torch.autograd.grad(output, leaves, grad.view_as(output))
        return [output.detach(), *grads]

    return Run(both, both)


def errors(run: Run, exact: list[Tensor]) -> list[float]:
    """Relative error (L2) of output and gradients."""
    return [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(run.outputs(), exact, strict=True)
    ]


def time_on_cpu(run: Run) -> tuple[float, float]:
    """Processor and wall milliseconds of one call, right after another: a model's layers."""
    run.call()
    wall, cpu = time.perf_counter(), time.process_time()
    run.call()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def time_on_gpu(run: Run, calls: int = 20) -> tuple[float, float]:
    """Milliseconds of one call between events, and wall milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    start.record()
    for _ in range(calls):
        run.call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, 1e3 * (time.perf_counter() - wall) / calls


def measure(
    ops: dict[str, Op], arguments: dict[str, list[Tensor]], backward: bool, device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """
    One row an implementation: median times, median ratio to the first, error.

    Args:
        ops: the first is the one that others are compared with.
        arguments: of each implementation.
        backward: forward and backward, or forward alone.
        device: cpu or cuda.
        rounds: turns of all implementations.
    """
    first = next(iter(ops))
    runs, failed = {}, {}
    for name, op in ops.items():
        try:
            runs[name] = make_run(op, arguments[name], backward)
            runs[name].call()
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
            failed[name] = str(error).splitlines()[0][:100]  # peers refuse some types or shapes
            runs.pop(name, None)
            if name == first:
                raise
    timer = time_on_gpu if device == "cuda" else time_on_cpu
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timer(run))
    exact_arguments = [tensor.double() for tensor in arguments["plain PyTorch"]]
    exact = make_run(ops["plain PyTorch"], exact_arguments, backward).outputs()
    for name, run in runs.items():
        own = [t for t, _ in times[name]]
        yield {
            "implementation": name,
            "ms": statistics.median(own),
            "wall_ms": statistics.median(t for _, t in times[name]),
            "times_psf": statistics.median(
                a / b[0] for a, b in zip(own, times[first], strict=True)
            ),
            "errors": errors(run, exact),
        }
    for name, reason in failed.items():
        yield {"implementation": name, "failed": reason}


def module_ops() -> dict[str, Op]:
    """From reference points, offsets and logits: fused, and the chain that other models run."""
    return {
        "psf fused": lambda v, r, o, w: ms_deform_attn_fused(v, SHAPES, r, o, w),
        "psf chain": lambda v, r, o, w: ms_deform_attn(v, SHAPES, *_chain(r, o, w)),
        "plain PyTorch": lambda v, r, o, w: ms_deform_attn_fused_reference(v, SHAPES, r, o, w),
    }


def _chain(reference: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(SHAPES, device=offsets.device).flip(-1)[:, None]
    locations = reference[:, :, None, :, None] + offsets / sizes
    return locations, logits.flatten(3).softmax(-1).view_as(logits)


def cases(device: str, quick: bool) -> list[Case]:
    """Encoder and decoder, realistic and random locations, all types."""
    low = [torch.bfloat16] if device == "cpu" else [torch.bfloat16, torch.float16]
    chosen = [
        Case("encoder", 1, None, torch.float32),
        Case("decoder 300", 1, 300, torch.float32),
        Case("encoder, random", 1, None, torch.float32, random=True),
    ]
    if quick:
        return chosen
    chosen += [Case(f"encoder {_short(dtype)}", 1, None, dtype) for dtype in low]
    chosen += [Case(f"decoder 300 {_short(dtype)}", 1, 300, dtype) for dtype in low]
    chosen.append(Case("encoder, 2 images", 2, None, torch.float32))
    if device == "cuda":
        chosen += [
            Case("encoder, 2 images bfloat16", 2, None, torch.bfloat16),
            Case("decoder 900", 1, 900, torch.float32),
            Case("decoder 900 bfloat16", 1, 900, torch.bfloat16),
            Case("encoder, random bfloat16", 1, None, torch.bfloat16, random=True),
        ]
    else:
        chosen += [Case("encoder float16", 1, None, torch.float16)]
        chosen += [Case("encoder float64", 1, None, torch.float64)]
    return chosen


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if has_extension():
        facts["kernels"] = torch.ops.psf.cpu_capability()
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    for package in ("torch_ms_deform_attn", "deformops", "mmcv", "transformers", "triton"):
        module = _module(package)
        if module is not None:
            facts[package] = getattr(module, "__version__", "unknown")
    return facts


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    title = f"{row['case']:28} {row['pass']:8} {row['implementation']:22}"
    if "failed" in row:
        print(f"{title} {row['failed']}")
        return
    worst = max(row["errors"])
    print(
        f"{title} {row['ms']:9.3f} ms  wall {row['wall_ms']:9.3f} ms  "
        f"x{row['times_psf']:7.2f}  error {worst:.1e}",
        flush=True,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default: 2)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="single precision, few cases")
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="leave it to the C library what becomes of freed memory",
    )
    parser.add_argument("--output", type=Path, help="folder for a JSON file of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {**machine(args.device), "memory": "as the C library does"}
    if args.device == "cpu" and not args.fresh_memory:
        keep_freed_memory()
        facts["memory"] = "freed memory is kept"
    print(json.dumps(facts, indent=1))
    rows: list[dict[str, Any]] = []
    for case in cases(args.device, args.quick):
        inputs = make_inputs(case, args.device)
        plain, fused = list(inputs[:3]), [inputs.value, *inputs[3:]]
        # Module level: what the layers before the operator give, to the operator's output.
        for kind, ops, tensors in (
            ("", implementations(args.device), plain),
            ("module, ", module_ops(), fused),
        ):
            for backward in (False, True):
                arguments = dict.fromkeys(ops, tensors)
                for row in measure(ops, arguments, backward, args.device, args.rounds):
                    passes = "f+b" if backward else "forward"
                    rows.append({"case": kind + case.name, "pass": passes, **row})
                    print_row(rows[-1])
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = facts.get("gpu") or f"{facts['processor']} {facts.get('kernels', 'plain')}"
        slug = "".join(c if c.isalnum() else "_" for c in name).strip("_")
        path = args.output / f"ms_deform_attn_{args.device}_{slug}.json"
        path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    sys.exit(main())
