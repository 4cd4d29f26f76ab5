"""Panoptic quality (Kirillov et al., 2019): PQ, SQ and RQ, by class and on average.

PQ of a class = SQ * RQ; SQ is the mean IoU of the matched segments, RQ = TP / (TP + FP/2 + FN/2).
"""

import itertools
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from numpy.typing import NDArray
from tabulate import tabulate

from psf.files import write_text
from psf.output_paths import below, refuse_inputs
from psf.panoptic_png import read_panoptic_ids, write_panoptic_ids

from .charts import drawn_or_warned, write_quality_bars
from .ground_truth import AnnotatedImage, PanopticAnnotations, read_annotations
from .outputs import require_output
from .panoptic_quality import (
    ClassQuality,
    ImageRecord,
    add_up,
    compare,
    quality_rows,
    warn_of_areas,
)

logger = logging.getLogger(__name__)

_SUFFIXES = ("", "_th", "_st")  # Detectron2's, of the means over all classes, things and stuff

PREDICTIONS = "predictions"


class _Predicted(NamedTuple):
    """What is kept of the prediction for an image."""

    image_id: Any
    record: ImageRecord | None  # None: there is no ground truth
    boundary_record: ImageRecord | None
    annotation: dict[str, Any] | None  # of the predictions' JSON; None: they are not saved


class PanopticEvaluator(DatasetEvaluator):
    """
    PQ, SQ and RQ of ``panoptic_seg``, equal to panopticapi's on a single core to the last bit.

    Each prediction is compared at once, and only its matches are kept. Unlike Detectron2's
    evaluator, the metrics do not depend on the number of processes, the PQ of things or stuff is
    NaN if the data set has none, and images of the same name may be in different folders.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        boundary: bool = False,
        save_predictions: bool = False,
    ) -> None:
        """
        Args:
            dataset_name: registered with Detectron2, with ``panoptic_json`` and ``panoptic_root``.
            output_dir: for ``pq.txt``, ``panoptic_results.json`` and ``pq.png``; None: not written.
            boundary: also measure Boundary PQ.
            save_predictions: write ``predictions.json`` and ``predictions/*.png`` to ``output_dir``
                in the format of COCO's server. Then the data set may lack annotations; it is not
                measured.

        Raises:
            ValueError: the data set is not panoptic, or predictions are saved without output_dir
                or over the ground truth.
        """
        if save_predictions and output_dir is None:
            raise ValueError("Predictions can only be saved with an output_dir.")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        self._boundary = boundary
        self._save = save_predictions
        for key in ("panoptic_json", "panoptic_root"):
            if self._metadata.get(key) is None:
                raise ValueError(
                    f"PQ of '{dataset_name}' needs '{key}' in the data set's metadata. Register "
                    "the data set in the COCO panoptic format."
                )
        self._dataset_ids = {  # by isthing
            isthing: {v: k for k, v in self._metadata.get(key).items()}
            for isthing, key in (
                (True, "thing_dataset_id_to_contiguous_id"),
                (False, "stuff_dataset_id_to_contiguous_id"),
            )
        }
        self._predictions_root = Path(output_dir or "", PREDICTIONS)
        self._predictions_json = self._predictions_root.with_suffix(".json")
        self.reset()
        if save_predictions:
            inputs = [Path(self._metadata.panoptic_root), Path(self._metadata.panoptic_json)]
            refuse_inputs([self._predictions_root, self._predictions_json], inputs)
            self._read_annotations()
            for name in self._png_names.values():
                below(self._predictions_root, name)
            self.reset()

    def reset(self) -> None:
        """Forget all predictions and the annotations, which are read when needed."""
        self._predicted: list[_Predicted] = []
        self._annotations: PanopticAnnotations | None = None

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Compare the predictions of a batch with the ground truth; neither argument is changed.

        Args:
            inputs: ``file_name`` and ``image_id`` of each image.
            outputs: ``panoptic_seg`` of each image: (H, W) int32 ids, and segments_info with id,
                category_id and isthing. Without isthing, category_id is the data set's own.

        Raises:
            KeyError: a segment is in the map but not in segments_info or the other way round, or
                its category is unknown, or the data set has no such image.
        """
        require_output(inputs, outputs, "panoptic_seg", "PANOPTIC_ON")
        annotations = self._read_annotations()
        for record, output in zip(inputs, outputs, strict=True):
            panoptic_seg, segments_info = output["panoptic_seg"]
            ids = panoptic_seg.cpu().numpy().astype(np.uint32)
            pred = {int(info["id"]): self._dataset_id(record, info) for info in segments_info}
            self._predicted.append(self._compare(record, ids, pred, annotations.images))

    def _dataset_id(self, record: Mapping[str, Any], info: Mapping[str, Any]) -> int:
        """The data set's category id of a predicted segment."""
        category_id, isthing = int(info["category_id"]), info.get("isthing")
        known: Any = self._known if isthing is None else self._dataset_ids[bool(isthing)]
        if category_id not in known:
            raise KeyError(
                f"Prediction of image {record['image_id']!r}: segment {info['id']} has the unknown "
                f"category_id {category_id}."
            )
        return category_id if isthing is None else known[category_id]

    def _compare(
        self,
        record: Mapping[str, Any],
        ids: NDArray[np.uint32],
        pred: dict[int, int],
        images: Mapping[Any, AnnotatedImage] | None,
    ) -> _Predicted:
        image_id = record["image_id"]
        quality = boundary_quality = annotation = None
        if images is not None:
            if image_id not in images:
                raise KeyError(
                    f"'{self._metadata.panoptic_json}' has no annotation of image {image_id!r} "
                    f"('{record['file_name']}'). Evaluate a data set with its own loader."
                )
            truth = images[image_id].segments
            png = os.path.join(self._metadata.panoptic_root, images[image_id].file_name)
            truth_ids = read_panoptic_ids(png)
            quality = compare(truth_ids, truth, ids, pred, image_id=image_id)
            if self._boundary:
                boundary_quality = compare(
                    truth_ids, truth, ids, pred, image_id=image_id, boundary=True
                )
        if self._save:
            annotation = self._save_prediction(image_id, ids, pred)
        return _Predicted(image_id, quality, boundary_quality, annotation)

    def _save_prediction(
        self, image_id: Any, ids: NDArray[np.uint32], pred: dict[int, int]
    ) -> dict[str, Any]:
        png = self._png_names[image_id]
        path = below(self._predictions_root, png)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._predictions_json.unlink(missing_ok=True)  # of other PNGs, if this ends early
        write_panoptic_ids(str(path), ids)
        infos = [{"id": i, "category_id": category_id} for i, category_id in pred.items()]
        return {"image_id": image_id, "file_name": png, "segments_info": infos}

    def _read_annotations(self) -> PanopticAnnotations:
        """Read the JSON, at the first call."""
        if self._annotations is None:
            path = self._metadata.panoptic_json
            annotations = read_annotations(path)
            if annotations.images is None and not self._save:
                raise ValueError(
                    f"'{path}' has no annotations, as the test sets of a benchmark. Evaluate on a "
                    "validation set (DATASETS.TEST), or set MODEL.PSF.TEST.SAVE_PREDICTIONS True "
                    "to write predictions without measuring them."
                )
            self._known = {category["id"] for category in annotations.categories}
            if self._save:
                self._png_names = prediction_names(annotations, path)
            self._annotations = annotations
        return self._annotations

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """
        Measure the predictions of all processes.

        Returns:
            On the main process, under "panoptic_seg" and in percent: PQ, SQ, RQ, the same with _th
            (things) and _st (stuff), and "PQ-<class>" for each class; NaN where neither ground
            truth nor predictions have a segment. Boundary PQ likewise under
            "boundary_panoptic_seg". None on the other processes.
        """
        comm.synchronize()
        gathered = comm.gather(self._predicted)
        if not comm.is_main_process():
            self.reset()
            return None
        annotations = self._read_annotations()
        predicted = {p.image_id: p for p in itertools.chain(*gathered)}
        if self._save:
            saved = [p.annotation for p in predicted.values() if p.annotation is not None]
            self._write_predictions(saved, annotations.categories)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if annotations.images is not None:
            in_order = self._in_order(predicted, annotations.images)
            categories = annotations.categories
            warn_of_areas((p.record for p in in_order if p.record), self._metadata.panoptic_json)
            results["panoptic_seg"] = self._measure([p.record for p in in_order], categories, "")
            if self._boundary:
                records = [p.boundary_record for p in in_order]
                results["boundary_panoptic_seg"] = self._measure(records, categories, "boundary_")
        self.reset()
        return results

    def _in_order(
        self, predicted: Mapping[Any, _Predicted], image_ids: Collection[Any]
    ) -> list[_Predicted]:
        """The predictions in the order of the annotations."""
        missing = [image_id for image_id in image_ids if image_id not in predicted]
        if missing:
            raise ValueError(
                f"No prediction for {len(missing)} of the {len(image_ids)} images of "
                f"'{self._metadata.panoptic_json}', the first with image ids {missing[:5]}. "
                "Evaluate the whole data set with its own loader."
            )
        return [predicted[image_id] for image_id in image_ids]

    def _measure(
        self,
        records: Sequence[ImageRecord | None],
        categories: Sequence[Mapping[str, Any]],
        prefix: str,
    ) -> dict[str, float]:
        """Add up and report; returns the numbers under Detectron2's names."""
        counts = add_up((r for r in records if r is not None), self._known)
        rows = quality_rows(counts, categories)
        self._report(rows, prefix)
        results: dict[str, float] = {}
        for suffix, row in zip(_SUFFIXES, rows, strict=False):
            results |= {f"PQ{suffix}": row.pq, f"SQ{suffix}": row.sq, f"RQ{suffix}": row.rq}
        return results | {f"PQ-{row.name}": row.pq for row in rows[len(_SUFFIXES) :]}

    def _report(self, rows: Sequence[ClassQuality], prefix: str) -> None:
        table = quality_table(rows)
        title = "Boundary panoptic quality" if prefix else "Panoptic quality"
        logger.info("%s:\n%s", title, table)
        if self._output_dir is None:
            return
        rows_json = json.dumps([_without_nan(row) for row in rows], indent=1)
        for name, text in (
            (f"{prefix}pq.txt", table),
            (f"{prefix}panoptic_results.json", rows_json),
        ):
            write_text(os.path.join(self._output_dir, name), f"{text}\n")
        chart = os.path.join(self._output_dir, f"{prefix}pq.png")
        with drawn_or_warned(chart):
            write_quality_bars(rows, chart, title=title)

    def _write_predictions(
        self,
        annotations: Sequence[Mapping[str, Any]],
        categories: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the JSON of a submission (cocodataset.org/#format-results)."""
        path = self._predictions_json
        content = {"annotations": annotations, "categories": categories}
        write_text(path, json.dumps(content))
        logger.info("Wrote the predictions for %d images to '%s'.", len(annotations), path)


def prediction_names(annotations: PanopticAnnotations, panoptic_json: str) -> dict[Any, str]:
    """
    The name of the predicted PNG of each image, as its PNG or, in a test set, as its image.

    Raises:
        ValueError: two images have the same, or one would lie outside of the output folder.
    """
    names: dict[Any, str] = {}
    if annotations.images is not None:
        names = {i: image.file_name for i, image in annotations.images.items()}
    else:
        files = {i: Path(name) for i, name in annotations.file_names.items()}
        files = {i: Path(p.name) if p.is_absolute() else p for i, p in files.items()}
        stems = Counter(path.with_suffix("") for path in files.values())
        for i, path in files.items():  # a.jpg and a.png: a.jpg.png and a.png.png
            is_single = stems[path.with_suffix("")] == 1
            names[i] = str(path.with_suffix(".png") if is_single else f"{path}.png")
    owners: dict[str, Any] = {}
    for image_id, name in names.items():
        other = owners.setdefault(os.path.normpath(name), image_id)
        if other != image_id:
            raise ValueError(
                f"'{panoptic_json}': the predictions for images {other!r} and {image_id!r} would "
                f"both be '{name}'. Give the images different names, or set "
                "MODEL.PSF.TEST.SAVE_PREDICTIONS False."
            )
    return names


def quality_table(rows: Sequence[ClassQuality]) -> str:
    """A table of the qualities, "-" where nothing was counted."""
    return tabulate(
        [[cell if cell == cell else None for cell in row] for row in rows],  # NaN != NaN
        headers=["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"],
        tablefmt="pipe",
        floatfmt=".2f",
        missingval="-",
    )


def _without_nan(row: ClassQuality) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in row._asdict().items()}
