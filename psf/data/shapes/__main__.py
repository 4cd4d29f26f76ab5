"""Generate the data set shapes: ``python -m psf.data.shapes --root datasets/shapes``."""

import argparse
import os

from detectron2.utils.logger import setup_logger

from psf.files import one_line

from .dataset import NUM_TRAIN, NUM_VAL, SEED, SIZE, default_root, generate_shapes


@one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m psf.data.shapes", description="Generate the synthetic data set shapes."
    )
    parser.add_argument("--root", default=default_root(), help="folder to make (%(default)s)")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help="images (%(default)s)")
    parser.add_argument("--num-val", type=int, default=NUM_VAL, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of all images (%(default)s)")
    args = parser.parse_args()
    setup_logger(name="psf")
    generate_shapes(
        os.path.expanduser(args.root),
        num_train=args.num_train,
        num_val=args.num_val,
        size=args.size,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
