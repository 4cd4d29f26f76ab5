"""Prepare a public data set: ``python -m psf.data.prepare coco|ade20k|cityscapes``."""

import argparse
from pathlib import Path

from detectron2.utils.logger import setup_logger

from psf.files import one_line

from ..coco_panoptic import datasets_root
from . import ade20k, cityscapes, coco

_DATA_SETS = {"ade20k": ade20k.prepare, "cityscapes": cityscapes.prepare, "coco": coco.prepare}


@one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m psf.data.prepare",
        description="Prepare a public data set from its official downloads, which "
        "datasets/README.md lists. A second run goes on where the first stopped.",
    )
    parser.add_argument("data_set", choices=sorted(_DATA_SETS))
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(datasets_root()),
        help="folder of the data sets, with the archives or their contents (%(default)s)",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="accept fewer images than the data set has"
    )
    args = parser.parse_args()
    setup_logger(name="psf")
    _DATA_SETS[args.data_set](args.root.expanduser(), allow_partial=args.allow_partial)


if __name__ == "__main__":
    main()
