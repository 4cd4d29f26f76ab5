"""Scores predictions saved in the format of COCO's server, also by image.

Shapes: H x W pixels of an image.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tqdm  # type: ignore[import-untyped]

from psf.data.annotations import read_panoptic_json, read_predictions
from psf.panoptic_png import read_panoptic_ids

from .ground_truth import pack
from .panoptic_quality import (
    VOID,
    ClassQuality,
    ImageRecord,
    Overlaps,
    TruthSegment,
    add_up,
    compare,
    count_overlaps,
    quality_rows,
    warn_of_areas,
)

MISSED = "(missed)"
INVENTED = "(nothing there)"


class ImageScore(NamedTuple):
    """The quality of one image."""

    image_id: Any
    file_name: str  # of the image
    pq: float  # in percent; NaN if neither truth nor prediction has a segment


class Scores(NamedTuple):
    """The quality of saved predictions."""

    rows: list[ClassQuality]  # all, things, stuff, then every class
    images: list[ImageScore]  # worst first
    confusion: Counter[tuple[str, str]]  # segments by (class in the truth, class predicted)


def score_predictions(
    truth_json: Path,
    truth_root: Path,
    pred_json: Path,
    pred_root: Path,
    *,
    boundary: bool = False,
) -> Scores:
    """
    Compare saved predictions with the ground truth: JSON files, and folders of their PNGs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an image has no prediction, a prediction and its PNG have different segments,
            or a file is not usable.
    """
    truth = read_panoptic_json(truth_json)
    if not truth.annotations:
        raise ValueError(f"'{truth_json}' has no annotations, as the test sets of a benchmark.")
    categories = truth.categories
    predictions = read_predictions(pred_json, categories)
    missing = [a["image_id"] for a in truth.annotations if a["image_id"] not in predictions]
    if missing:
        raise ValueError(
            f"'{pred_json}' has no prediction for {len(missing)} of the "
            f"{len(truth.annotations)} images of '{truth_json}', the first are {missing[:5]}."
        )
    names = {c["id"]: c["name"] for c in categories}
    records, scores = [], []
    confusion: Counter[tuple[str, str]] = Counter()
    for annotation in tqdm.tqdm(truth.annotations, desc="images", disable=None):
        image_id = annotation["image_id"]
        prediction = predictions[image_id]
        truth_ids = read_panoptic_ids(str(truth_root / annotation["file_name"]))
        pred_ids = read_panoptic_ids(str(pred_root / prediction["file_name"]))
        segments = pack(annotation).segments
        predicted = {s["id"]: s["category_id"] for s in prediction["segments_info"]}
        try:
            record = compare(
                truth_ids, segments, pred_ids, predicted, image_id=image_id, boundary=boundary
            )
        except KeyError as error:
            raise ValueError(f"'{pred_json}': {error.args[0]}") from error
        records.append(record)
        file_name = truth.images[image_id]["file_name"]
        scores.append(ImageScore(image_id, file_name, _pq_of(record, categories)))
        confusion += _confusion(count_overlaps(truth_ids, pred_ids), segments, predicted, names)
    warn_of_areas(records, truth_json)
    scores.sort(key=lambda s: (s.pq != s.pq, s.pq))
    return Scores(quality_rows(add_up(records, names), categories), scores, confusion)


def _pq_of(record: ImageRecord, categories: list[dict[str, Any]]) -> float:
    counts = add_up([record], [c["id"] for c in categories])
    return quality_rows(counts, categories)[0].pq


def _confusion(
    overlaps: Overlaps,
    truth: Mapping[int, TruthSegment],
    pred: Mapping[int, int],
    names: Mapping[int, str],
) -> Counter[tuple[str, str]]:
    """
    Match segments of any classes at an IoU above 0.5, so that each has at most one match.

    Predictions that are mostly in void or crowds are left out, as in PQ.
    """
    truth_areas: Counter[int] = Counter()
    pred_areas: Counter[int] = Counter()
    excused: Counter[int] = Counter()
    for (truth_id, pred_id), count in overlaps.items():
        truth_areas[truth_id] += count
        pred_areas[pred_id] += count
        if truth_id == VOID or (truth_id in truth and truth[truth_id].iscrowd):
            excused[pred_id] += count
    result: Counter[tuple[str, str]] = Counter()
    matched: set[int] = set()
    found: set[int] = set()
    for (truth_id, pred_id), intersection in overlaps.items():
        if truth_id not in truth or pred_id not in pred or truth[truth_id].iscrowd:
            continue
        in_void = overlaps.get((VOID, pred_id), 0)
        union = pred_areas[pred_id] + truth_areas[truth_id] - intersection - in_void
        if 2 * intersection > union:
            result[names[truth[truth_id].category_id], names[pred[pred_id]]] += 1
            found.add(truth_id)
            matched.add(pred_id)
    for truth_id, segment in truth.items():
        if truth_id not in found and not segment.iscrowd:
            result[names[segment.category_id], MISSED] += 1
    for pred_id, category_id in pred.items():
        if pred_id not in matched and 2 * excused[pred_id] <= pred_areas[pred_id]:
            result[INVENTED, names[category_id]] += 1
    return result
