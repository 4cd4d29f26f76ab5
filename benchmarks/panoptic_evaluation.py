"""PQ of 100 images: CPU time of this project's evaluator and of Detectron2's, and their numbers.

Memory (by tracemalloc, of Python and numpy) is measured on data sets that repeat these images under
other ids.

OMP_NUM_THREADS=1 python benchmarks/panoptic_evaluation.py
"""

import argparse
import gc
import itertools
import json
import logging
import multiprocessing
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from cpu_time import environment, measure, write_result
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator
from panoptic_workload import Workload, make_workload

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


def process(evaluator: DatasetEvaluator, workload: Workload, num_images: int) -> None:
    """Images with the ids 0, 1, ..., which repeat those of the workload."""
    images = itertools.cycle(zip(workload.inputs, workload.outputs, strict=True))
    for image_id, (record, output) in zip(range(num_images), images, strict=False):
        panoptic_seg, infos = output["panoptic_seg"]
        evaluator.process(
            [{**record, "image_id": image_id}],
            [{"panoptic_seg": (panoptic_seg, [dict(info) for info in infos])}],
        )


def repeat(workload: Workload, num_images: int, path: Path) -> None:
    """Write a JSON of ``num_images`` images, which repeat those of the workload."""
    content = json.loads(workload.panoptic_json.read_text())
    for key, id_key in (("images", "id"), ("annotations", "image_id")):
        repeated = itertools.islice(itertools.cycle(content[key]), num_images)
        content[key] = [{**item, id_key: i} for i, item in enumerate(repeated)]
    path.write_text(json.dumps(content))


def memory(workload: Workload, folder: Path, num_images: int) -> dict[str, float]:
    """MB that the evaluator holds, at most and after each stage."""
    name = f"{NAME}_{num_images}"
    path = folder / f"{num_images}.json"
    repeat(workload, num_images, path)
    root = str(workload.panoptic_root)
    metadata = panoptic_metadata(COCO_CATEGORIES)
    MetadataCatalog.get(name).set(panoptic_json=str(path), panoptic_root=root, **metadata)
    evaluator = PanopticEvaluator(name)
    result = {"size of the JSON": path.stat().st_size / 1e6}
    gc.collect()
    tracemalloc.start()
    evaluator.process([], [])  # the annotations are read at the first call
    held, peak = tracemalloc.get_traced_memory()
    result |= {"annotations read": held / 1e6, "annotations read, peak": peak / 1e6}
    tracemalloc.reset_peak()
    process(evaluator, workload, num_images)
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    result |= {"images processed": held / 1e6, "images processed, peak": peak / 1e6}
    tracemalloc.reset_peak()
    evaluator.evaluate()
    result["evaluated, peak"] = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return result


def detectron2_memory(workload: Workload, num_images: int) -> float:
    """MB that Detectron2's evaluator holds of as many images before it evaluates them."""
    evaluator = COCOPanopticEvaluator(NAME)
    evaluator.reset()
    gc.collect()
    tracemalloc.start()
    process(evaluator, workload, num_images)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / 1e6


def growth(memories: dict[int, dict[str, float]]) -> dict[str, float]:
    """Bytes per image by which each stage grows from the least to the greatest data set."""
    least, greatest = min(memories), max(memories)
    return {
        stage: (memories[greatest][stage] - value) * 1e6 / (greatest - least)
        for stage, value in memories[least].items()
    }


def quality_and_time(workload: Workload, rounds: int) -> dict[str, Any]:
    """CPU time of both evaluators, taking turns, and the numbers that they give."""
    numbers: dict[str, dict[str, float]] = {}

    def ours() -> None:
        numbers["psf"] = run(PanopticEvaluator(NAME), workload)

    def theirs() -> None:
        numbers["Detectron2"] = run(COCOPanopticEvaluator(NAME), workload)

    seconds = measure({"psf": ours, "Detectron2": theirs}, rounds=rounds)
    multiprocessing.cpu_count = lambda: 1  # panopticapi then adds up in the images' order
    numbers["Detectron2, panopticapi on one core"] = run(COCOPanopticEvaluator(NAME), workload)
    reference = seconds["Detectron2"]["median"]
    keys = numbers["Detectron2"].keys()
    return {
        "cpu_seconds": seconds,
        "times_less_than_detectron2": {k: reference / v["median"] for k, v in seconds.items()},
        "greatest_difference_of_psf_to": {
            name: max(abs(float(numbers["psf"][k]) - float(found[k])) for k in keys)
            for name, found in numbers.items()
        },
        "PQ": {name: float(found["PQ"]) for name, found in numbers.items()},
    }


def memories(workload: Workload, folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """What both evaluators hold, and how much it grows per image."""
    ours = {n: memory(workload, folder, n) for n in sizes}
    least = min(ours)
    theirs = detectron2_memory(workload, least)
    return {
        "memory_mb": {
            "by the number of images": ours,
            f"Detectron2, {least} images processed": theirs,
        },
        "memory_bytes_per_image": {
            **growth(ours),
            "Detectron2, images processed": theirs * 1e6 / least,
        },
    }


def describe(workload: Workload) -> dict[str, float]:
    files = list(workload.panoptic_root.glob("*.png"))
    segments = [len(output["panoptic_seg"][1]) for output in workload.outputs]
    return {
        "images": len(workload.inputs),
        "mean_kb_of_png": sum(f.stat().st_size for f in files) / len(files) / 1000,
        "mean_predicted_segments": sum(segments) / len(segments),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (%(default)s)")
    parser.add_argument(
        "--memory-images", type=int, nargs=2, default=(500, 5000), help="%(default)s"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    logging.disable(logging.INFO)
    # Before quality_and_time tells panopticapi that there is one core.
    result: dict[str, Any] = {
        "environment": environment("torch", "numpy", "opencv-python-headless", "pillow")
    }
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), args.images)
        MetadataCatalog.get(NAME).set(
            panoptic_json=str(workload.panoptic_json),
            panoptic_root=str(workload.panoptic_root),
            **panoptic_metadata(COCO_CATEGORIES),
        )
        result["workload"] = describe(workload)
        result |= quality_and_time(workload, args.rounds)
        result |= memories(workload, Path(folder), args.memory_images)
    write_result("panoptic_evaluation", result)


if __name__ == "__main__":
    main()
