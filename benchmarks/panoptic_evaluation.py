"""PQ of 100 images: CPU time of this project's evaluator and of Detectron2's, and their numbers.

OMP_NUM_THREADS=1 python benchmarks/panoptic_evaluation.py
"""

import argparse
import logging
import multiprocessing
import tempfile
from pathlib import Path

import cv2
import torch
from cpu_time import environment, measure, write_result
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator
from panoptic_workload import Workload, make_workload

from psf import panoptic_png
from psf.data import panoptic_metadata
from psf.evaluation import PanopticEvaluator

NAME = "benchmark_panoptic"


def run(evaluator: DatasetEvaluator, workload: Workload) -> dict[str, float]:
    """What ``inference_on_dataset`` does around the model, image by image."""
    evaluator.reset()
    for record, output in zip(workload.inputs, workload.outputs, strict=True):
        panoptic_seg, infos = output["panoptic_seg"]
        # Detectron2's evaluator writes into the dicts.
        evaluator.process(
            [record], [{"panoptic_seg": (panoptic_seg, [dict(info) for info in infos])}]
        )
    return evaluator.evaluate()["panoptic_seg"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), args.images)
        MetadataCatalog.get(NAME).set(
            panoptic_json=str(workload.panoptic_json),
            panoptic_root=str(workload.panoptic_root),
            **panoptic_metadata(COCO_CATEGORIES),
        )
        numbers: dict[str, dict[str, float]] = {}

        def ours() -> None:
            numbers["psf"] = run(PanopticEvaluator(NAME), workload)

        def ours_without_extension() -> None:
            extension, panoptic_png.image_extension = panoptic_png.image_extension, None
            numbers["psf, PNGs by Pillow"] = run(PanopticEvaluator(NAME), workload)
            panoptic_png.image_extension = extension

        def theirs() -> None:
            numbers["Detectron2"] = run(COCOPanopticEvaluator(NAME), workload)

        ways = {
            "psf": ours,
            "psf, PNGs by Pillow": ours_without_extension,
            "Detectron2": theirs,
        }
        seconds = measure(ways, rounds=args.rounds)
        multiprocessing.cpu_count = lambda: 1  # panopticapi then adds up in the images' order
        numbers["Detectron2, panopticapi on one core"] = run(COCOPanopticEvaluator(NAME), workload)
        files = list(workload.panoptic_root.glob("*.png"))
        segments = [len(output["panoptic_seg"][1]) for output in workload.outputs]
        description = {
            "images": args.images,
            "mean_kb_of_png": sum(f.stat().st_size for f in files) / len(files) / 1000,
            "mean_predicted_segments": sum(segments) / len(segments),
        }
    reference = seconds["Detectron2"]["median"]
    keys = numbers["Detectron2"].keys()
    write_result(
        "panoptic_evaluation",
        {
            "environment": environment("torch", "numpy", "opencv-python-headless", "pillow"),
            "workload": description,
            "cpu_seconds": seconds,
            "times_less_than_detectron2": {k: reference / v["median"] for k, v in seconds.items()},
            "greatest_difference_of_psf_to": {
                name: max(abs(float(numbers["psf"][k]) - float(found[k])) for k in keys)
                for name, found in numbers.items()
            },
            "PQ": {name: float(found["PQ"]) for name, found in numbers.items()},
        },
    )


if __name__ == "__main__":
    main()
