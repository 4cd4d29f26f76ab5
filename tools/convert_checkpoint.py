#!/usr/bin/env python3
r"""Convert third-party checkpoints to this project's names, and back.

    python tools/convert_checkpoint.py panoptic_segformer_r50_2x.pth converted/r50_24ep.pth
    python tools/convert_checkpoint.py --to-authors output/model_final.pth for_mmdet.pth

Recognizes the authors' released Panoptic SegFormer (early and present names), torchvision's ResNet,
the official Swin and PVTv2, and timm's PVTv2 (.pth, .bin or .safetensors). MODEL.WEIGHTS also takes
these files directly.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

from torch import Tensor

from psf import checkpoint
from psf.config import user_path
from psf.files import one_line, save_tensors
from psf.weights import CONVERTED_FROM, read_file


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: ``sys.argv``)."""
    usage, _, description = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=usage,
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=user_path, help="the file to convert")
    parser.add_argument("target", type=user_path, help="the file to write")
    parser.add_argument(
        "--to-authors", action="store_true", help="from this project's names to the authors'"
    )
    return parser.parse_args(argv)


@one_line()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion; errors are one line."""
    args = parse_args(argv)
    if not args.source.is_file():
        raise SystemExit(f"There is no file '{args.source}'")
    if args.target.is_dir():
        raise SystemExit(f"'{args.target}' is a folder: name the file to write")
    if args.target.exists() and args.target.samefile(args.source):
        raise SystemExit(f"'{args.target}' would overwrite the file to convert")
    weights = checkpoint.find_state_dict(read_file(str(args.source)))
    if args.to_authors:
        content = {"state_dict": to_authors(weights, args.source)}
    else:
        content = convert(weights, args.source)
    save_tensors(args.target, content)
    print(args.target)


def convert(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Convert weights to this project's names; print the dropped entries."""
    source = checkpoint.recognise(weights)
    if source is None:
        known = "; ".join(f.name for f in checkpoint.FORMATS)
        raise SystemExit(f"'{path}' has none of the known formats: {known}")
    conversion = checkpoint.convert(weights, source)
    print(f"{source.name}: {len(weights)} entries, {len(conversion.dropped)} dropped:")
    for name, reason in conversion.dropped.items():
        print(f"  {name}: {reason}")
    return {"model": conversion.state_dict, CONVERTED_FROM: source.name}


def to_authors(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert weights to the authors' names."""
    if checkpoint.recognise(weights) in checkpoint.AUTHORS:
        raise SystemExit(f"'{path}' already has the authors' names")
    return checkpoint.to_authors(weights)


if __name__ == "__main__":
    main()
