#!/usr/bin/env python3
"""Convert other annotations to the COCO panoptic format.

python tools/convert_to_panoptic.py instances --json instances.json --labels stuff_maps/ \\
    --stuff-categories stuff.json --output converted/
python tools/convert_to_panoptic.py labelme --input folder/ --stuff sky,grass --output converted/

Both write panoptic.json, panoptic/ and instances.json into the output folder.
"""

import argparse
from collections.abc import Sequence

from psf.config import user_path
from psf.data.annotations import read_json
from psf.data.prepare.convert import convert_instances, convert_labelme
from psf.files import one_line


@one_line()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    instances = commands.add_parser("instances", help="COCO instances with stuff label maps")
    instances.add_argument(
        "--json", type=user_path, required=True, help="COCO instance annotations"
    )
    instances.add_argument(
        "--labels",
        type=user_path,
        required=True,
        help="folder of PNGs whose values are category ids",
    )
    instances.add_argument(
        "--stuff-categories", type=user_path, required=True, help="JSON: a list of {id, name}"
    )
    labelme = commands.add_parser("labelme", help="a folder of LabelMe's JSON files")
    labelme.add_argument("--input", type=user_path, required=True, help="folder of the JSON files")
    labelme.add_argument("--stuff", default="", help="stuff labels, separated by commas")
    for command in (instances, labelme):
        command.add_argument("--output", type=user_path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.command == "instances":
        stuff = read_json(args.stuff_categories)
        convert_instances(args.json, args.labels, stuff, args.output)
    else:
        names = [name.strip() for name in args.stuff.split(",") if name.strip()]
        convert_labelme(args.input, names, args.output)
    print(args.output / "panoptic.json")


if __name__ == "__main__":
    main()
