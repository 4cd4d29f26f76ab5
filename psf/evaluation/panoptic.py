"""Panoptic quality (Kirillov et al., 2019): PQ, SQ and RQ, by class and on average.

PQ of a class = SQ * RQ; SQ is the mean IoU of the matched segments, RQ = TP / (TP + FP/2 + FN/2).
"""

import contextlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from panopticapi.evaluation import PQStat, pq_compute_single_core
from tabulate import tabulate

from .outputs import require_output

logger = logging.getLogger(__name__)

# Detectron2's names of the averages, and panopticapi's selection by ``isthing``.
_AVERAGES = {"": None, "_th": True, "_st": False}
_ROW_NAMES = {"": "all", "_th": "things", "_st": "stuff"}


class ClassQuality(NamedTuple):
    """Quality of one class, or the mean over a group of classes; NaN where nothing was counted."""

    name: str
    kind: str  # "thing", "stuff"; "mean" of a group
    pq: float  # in percent, as sq and rq
    sq: float
    rq: float
    tp: int  # matched segments; of a group: the sum over its classes
    fp: int  # predicted segments without a match
    fn: int  # segments of the ground truth without a match


class PanopticEvaluator(COCOPanopticEvaluator):
    """
    Detectron2's PQ evaluator, with the quality of every class.

    Unlike its parent it needs neither things nor stuff in the data set, leaves no worker processes
    behind, and tells apart images of the same name in different folders. Metrics are computed in
    one process by panopticapi, so they do not depend on the number of processes.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: registered with Detectron2, with ``panoptic_json`` and ``panoptic_root``.
            output_dir: where ``pq.txt`` and ``panoptic_results.json`` go; None: nowhere.

        Raises:
            ValueError: the data set is not a panoptic one.
            FileNotFoundError: its annotations do not exist.
        """
        super().__init__(dataset_name, output_dir)
        for key in ("panoptic_json", "panoptic_root"):
            path = self._metadata.get(key)
            if path is None:
                raise ValueError(
                    f"PQ of '{dataset_name}' needs '{key}' in the data set's metadata. Register "
                    "the data set in the COCO panoptic format."
                )
            if not PathManager.exists(path):
                raise FileNotFoundError(
                    f"PQ of '{dataset_name}': '{path}' ({key}) does not exist. Set the environment "
                    "variable DETECTRON2_DATASETS to the folder of the data sets."
                )

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Store the predictions of a batch; neither argument is changed.

        Args:
            inputs: ``file_name`` and ``image_id`` of each image.
            outputs: ``panoptic_seg`` of each image.
        """
        require_output(inputs, outputs, "panoptic_seg", "PANOPTIC_ON")
        copies = []
        for output in outputs:
            panoptic_seg, segments_info = output["panoptic_seg"]
            # What the JSON needs, as plain Python: the parent writes into these dicts.
            infos = [
                {
                    "id": int(info["id"]),
                    "category_id": int(info["category_id"]),
                    "isthing": bool(info["isthing"]),
                }
                for info in segments_info
            ]
            copies.append({"panoptic_seg": (panoptic_seg, infos)})
        super().process(inputs, copies)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """
        Measure the predictions of all processes.

        Returns:
            On the main process, under "panoptic_seg" and in percent: PQ, SQ, RQ, the same with _th
            (things) and _st (stuff), and "PQ-<class>" of each class; NaN where neither the ground
            truth nor the predictions have a segment. None on the other processes.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = list(itertools.chain(*gathered))
        ground_truth = _load_annotations(self._metadata.panoptic_json)
        categories = {category["id"]: category for category in ground_truth["categories"]}
        logger.info("Computing PQ of %d images ...", len(predictions))
        quality = self._compute(predictions, ground_truth["annotations"], categories)
        averages = {suffix: _average(quality, categories, suffix) for suffix in _AVERAGES}
        classes = [_class_quality(quality, category) for category in categories.values()]
        self._report([*averages.values(), *classes])

        results: dict[str, float] = {}
        for suffix, row in averages.items():
            results |= {f"PQ{suffix}": row.pq, f"SQ{suffix}": row.sq, f"RQ{suffix}": row.rq}
        results |= {f"PQ-{row.name}": row.pq for row in classes}
        return OrderedDict(panoptic_seg=results)

    def _compute(
        self,
        predictions: Sequence[dict[str, Any]],
        annotations: Sequence[dict[str, Any]],
        categories: dict[int, dict[str, Any]],
    ) -> PQStat:
        """Count matches, misses and false alarms of every class with panopticapi."""
        # Numbered, because images of different folders may have the same name.
        by_image = {
            p["image_id"]: {**p, "file_name": f"{i}.png"} for i, p in enumerate(predictions)
        }
        missing = [a["image_id"] for a in annotations if a["image_id"] not in by_image]
        if missing:
            raise ValueError(
                f"No prediction for {len(missing)} of the {len(annotations)} images of "
                f"'{self._metadata.panoptic_json}', the first with image ids {missing[:5]}. "
                "Evaluate the whole data set with its own loader."
            )
        pairs = [(annotation, by_image[annotation["image_id"]]) for annotation in annotations]
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            for prediction in by_image.values():
                Path(folder, prediction["file_name"]).write_bytes(prediction["png_string"])
            gt_folder = PathManager.get_local_path(self._metadata.panoptic_root)
            with contextlib.redirect_stdout(io.StringIO()):  # panopticapi prints its progress
                return pq_compute_single_core(0, pairs, gt_folder, folder, categories)

    def _report(self, rows: Sequence[ClassQuality]) -> None:
        table = tabulate(
            [[cell if cell == cell else None for cell in row] for row in rows],  # NaN != NaN
            headers=["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"],
            tablefmt="pipe",
            floatfmt=".2f",
            missingval="-",
        )
        logger.info("Panoptic quality:\n%s", table)
        if self._output_dir is None:
            return
        rows_json = json.dumps([_without_nan(row) for row in rows], indent=1)
        for name, text in (("pq.txt", table), ("panoptic_results.json", rows_json)):
            path = os.path.join(self._output_dir, name)
            with PathManager.open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")


def _load_annotations(path: str) -> dict[str, Any]:
    with PathManager.open(path, "r", encoding="utf-8") as file:
        content = json.load(file)
    if "annotations" not in content:
        raise ValueError(
            f"'{path}' has no annotations, as the test sets of a benchmark. Evaluate on a "
            "validation set (DATASETS.TEST)."
        )
    return content


def _class_quality(quality: PQStat, category: dict[str, Any]) -> ClassQuality:
    counted = quality[category["id"]]
    kind = "thing" if category["isthing"] else "stuff"
    counts = (counted.tp, counted.fp, counted.fn)
    if not any(counts):
        return ClassQuality(category["name"], kind, math.nan, math.nan, math.nan, *counts)
    size = counted.tp + 0.5 * counted.fp + 0.5 * counted.fn
    return ClassQuality(
        category["name"],
        kind,
        100 * float(counted.iou / size),
        100 * float(counted.iou / counted.tp if counted.tp else 0),
        100 * float(counted.tp / size),
        *counts,
    )


def _average(quality: PQStat, categories: dict[int, dict[str, Any]], suffix: str) -> ClassQuality:
    """Mean over the classes of a group that occur in the ground truth or in the predictions."""
    isthing = _AVERAGES[suffix]
    group = [i for i, c in categories.items() if isthing is None or isthing == (c["isthing"] == 1)]
    tp, fp, fn = (sum(getattr(quality[i], key) for i in group) for key in ("tp", "fp", "fn"))
    mean = {"pq": math.nan, "sq": math.nan, "rq": math.nan}
    if tp + fp + fn:  # panopticapi divides by the number of classes that occur
        mean, _ = quality.pq_average(categories, isthing=isthing)
    pq, sq, rq = (100 * float(mean[key]) for key in ("pq", "sq", "rq"))
    return ClassQuality(_ROW_NAMES[suffix], "mean", pq, sq, rq, tp, fp, fn)


def _without_nan(row: ClassQuality) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in row._asdict().items()}
