"""Panoptic quality by the definition of panopticapi's ``pq_compute_single_core``, to the last bit.

An image is reduced to a :class:`ImageRecord` of one or two KB; the records of all images are
added up in the order of the annotations, so that neither the number of processes nor the order in
which they come changes a bit of the result.

Panopticapi's rules that its paper (Kirillov et al., 2019) does not mention are kept: the area of a
segment of the ground truth is the JSON's; where a category has several crowd segments in an image,
only the last one excuses predictions; pixels whose id the JSON of the ground truth lacks are
neither void nor segment. Unlike it, a group of classes without any segment has quality NaN.

Shapes: H x W pixels of an image.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

VOID = 0

# Width of a segment's boundary in parts of the image's diagonal (Boundary IoU, arXiv 2103.16562,
# section 5; its code for COCO panoptic).
_BOUNDARY_WIDTH = 0.02

Overlaps = dict[tuple[int, int], int]  # pixels of every pair (id in the truth, id predicted)


class TruthSegment(NamedTuple):
    """What counts of a segment of the ground truth."""

    category_id: int  # of the data set
    area: float  # as the JSON says
    iscrowd: bool


class ImageRecord(NamedTuple):
    """Matches, false alarms and misses of an image, each by its category id."""

    image_id: Any
    matches: tuple[tuple[int, float], ...]  # category and IoU, by rising ids of the two segments
    false_positives: tuple[int, ...]
    false_negatives: tuple[int, ...]


class ClassCounts(NamedTuple):
    """Sums over the images, of one class."""

    iou: float
    tp: int
    fp: int
    fn: int


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


def compare(
    truth_ids: NDArray[np.uint32],
    truth: Mapping[int, TruthSegment],
    pred_ids: NDArray[np.uint32],
    pred: Mapping[int, int],
    *,
    image_id: Any,
    boundary: bool = False,
) -> ImageRecord:
    """
    Match the segments of an image.

    Args:
        truth_ids: (H, W), the segment at each pixel; 0 is void.
        truth: the segments by id. Ids of the map that are not here are ignored.
        pred_ids: (H, W), likewise.
        pred: the category id of each predicted segment.
        image_id: for the record and the messages.
        boundary: Boundary PQ: two segments match as well as the worse of the IoU of their masks and
            that of their boundaries.

    Raises:
        KeyError: ``pred`` and ``pred_ids`` have different segments.
        ValueError: the sizes differ, or an area in the JSON makes a union empty.
    """
    if truth_ids.shape != pred_ids.shape:
        raise ValueError(
            f"Image {image_id!r}: the prediction is {pred_ids.shape} but the ground truth "
            f"{truth_ids.shape} pixels (height, width)."
        )
    overlaps = count_overlaps(truth_ids, pred_ids)
    pred_areas = _areas(overlaps, side=1)
    check_prediction(pred_areas.keys(), pred, image_id)
    ious = _ious(overlaps, truth, pred, pred_areas, image_id)
    if boundary and ious:
        ious = _limit_by_boundaries(ious, truth_ids, truth, pred_ids)
    matched = {pair: iou for pair, iou in ious.items() if iou > 0.5}
    truth_matched = {truth_id for truth_id, _ in matched}
    pred_matched = {pred_id for _, pred_id in matched}
    crowds: dict[int, int] = {}  # the last crowd segment of each category
    misses = []
    for truth_id, segment in truth.items():
        if segment.iscrowd:
            crowds[segment.category_id] = truth_id
        elif truth_id not in truth_matched:
            misses.append(segment.category_id)
    alarms = []
    for pred_id, category_id in pred.items():
        if pred_id in pred_matched:
            continue
        excused = overlaps.get((VOID, pred_id), 0)
        if category_id in crowds:
            excused += overlaps.get((crowds[category_id], pred_id), 0)
        if not excused / pred_areas[pred_id] > 0.5:
            alarms.append(category_id)
    return ImageRecord(
        image_id,
        tuple((pred[pred_id], iou) for (_, pred_id), iou in matched.items()),
        tuple(alarms),
        tuple(misses),
    )


def count_overlaps(truth_ids: NDArray[np.uint32], pred_ids: NDArray[np.uint32]) -> Overlaps:
    """
    Count the pixels of every pair of ids, by rising ids of the truth, then of the prediction.

    Args:
        truth_ids: (H, W).
        pred_ids: (H, W).
    """
    truth, pred = truth_ids.ravel(), pred_ids.ravel()
    if not truth.size:
        return {}
    # Segments are compact: it pays to sort the runs of equal pairs instead of the pixels.
    changes = truth[1:] != truth[:-1]
    changes |= pred[1:] != pred[:-1]
    starts = np.append(0, np.flatnonzero(changes) + 1)
    lengths = np.diff(starts, append=truth.size)
    keys = truth[starts].astype(np.uint64) << np.uint64(32) | pred[starts]
    pairs, pair_of_run = np.unique(keys, return_inverse=True)
    counts = np.bincount(pair_of_run, weights=lengths)  # exact: far below 2^53
    return {
        (pair >> 32, pair & 0xFFFFFFFF): int(count)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    }


def check_prediction(ids: Iterable[int], pred: Mapping[int, int], image_id: Any) -> None:
    """Raise KeyError unless the map of a prediction has exactly its segments (and void)."""
    found = set(ids) - {VOID}
    unknown, absent = sorted(found - pred.keys()), sorted(pred.keys() - found)
    if unknown:
        raise KeyError(
            f"Prediction of image {image_id!r}: the map has segment ids {unknown[:5]} that "
            "segments_info does not list."
        )
    if absent:
        raise KeyError(
            f"Prediction of image {image_id!r}: segments_info lists segment ids {absent[:5]} that "
            "have no pixel in the map."
        )


def _areas(overlaps: Overlaps, side: int) -> dict[int, int]:
    """Pixels of every id of the truth (side 0) or of the prediction (side 1)."""
    areas: dict[int, int] = {}
    for pair, count in overlaps.items():
        areas[pair[side]] = areas.get(pair[side], 0) + count
    return areas


def _ious(
    overlaps: Overlaps,
    truth: Mapping[int, TruthSegment],
    pred: Mapping[int, int],
    pred_areas: Mapping[int, int],
    image_id: Any,
) -> dict[tuple[int, int], float]:
    """The IoU of all pairs of segments of one category that overlap."""
    ious = {}
    for (truth_id, pred_id), intersection in overlaps.items():
        segment = truth.get(truth_id)
        if segment is None or segment.iscrowd or segment.category_id != pred.get(pred_id):
            continue
        in_void = overlaps.get((VOID, pred_id), 0)
        union = pred_areas[pred_id] + segment.area - intersection - in_void
        if union == 0:
            raise ValueError(
                f"Image {image_id!r}: the area {segment.area} of segment {truth_id} in the JSON of "
                "the ground truth contradicts its PNG. Correct it (tools/check_dataset.py)."
            )
        ious[truth_id, pred_id] = intersection / union
    return ious


def _limit_by_boundaries(
    ious: Mapping[tuple[int, int], float],
    truth_ids: NDArray[np.uint32],
    truth: Mapping[int, TruthSegment],
    pred_ids: NDArray[np.uint32],
) -> dict[tuple[int, int], float]:
    """The lesser of each pair's IoU and the IoU of the two boundaries."""
    interior = 1 + int(max(truth_ids.max(), pred_ids.max()))
    ignored = np.isin(truth_ids, list(truth), invert=True)  # void, and ids that the JSON lacks
    truth_edges = np.where(_is_boundary(truth_ids) | ignored, truth_ids, np.uint32(interior))
    pred_edges = np.where(_is_boundary(pred_ids), pred_ids, np.uint32(interior))
    overlaps = count_overlaps(truth_edges, pred_edges)
    truth_areas, pred_areas = _areas(overlaps, side=0), _areas(overlaps, side=1)
    limited = {}
    for pair, iou in ious.items():
        intersection = overlaps.get(pair, 0)
        in_void = overlaps.get((VOID, pair[1]), 0)
        union = pred_areas[pair[1]] + truth_areas[pair[0]] - intersection - in_void
        limited[pair] = min(iou, intersection / union)
    return limited


def _is_boundary(ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """(H, W), whether a pixel is near another segment or the border of the image."""
    width = max(1, round(_BOUNDARY_WIDTH * math.hypot(*ids.shape)))
    # A square of one id has its least equal to its greatest: two filters do for all segments what
    # Boundary IoU's code does with one erosion for each. Ids below 2^24 are exact as float32.
    padded = cv2.copyMakeBorder(
        ids.astype(np.float32), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(-1.0,)
    )
    square = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    inside = slice(1, -1)
    least = cv2.erode(padded, square)[inside, inside]
    greatest = cv2.dilate(padded, square)[inside, inside]
    return least != greatest


def add_up(records: Iterable[ImageRecord], category_ids: Iterable[int]) -> dict[int, ClassCounts]:
    """
    Sums over the images, of every class.

    Args:
        records: in the order of the annotations, which the last bits of the sums depend on.
        category_ids: of the data set. What other categories the truth has does not count.
    """
    ious = dict.fromkeys(category_ids, 0.0)
    counts = {category_id: [0, 0, 0] for category_id in ious}  # tp, fp, fn
    for record in records:
        for category_id, iou in record.matches:
            ious[category_id] += iou
            counts[category_id][0] += 1
        for category_id in record.false_positives:
            counts[category_id][1] += 1
        for category_id in record.false_negatives:
            if category_id in counts:
                counts[category_id][2] += 1
    return {
        category_id: ClassCounts(ious[category_id], *counts[category_id]) for category_id in ious
    }


def class_qualities(
    counts: Mapping[int, ClassCounts], categories: Sequence[Mapping[str, Any]]
) -> list[ClassQuality]:
    """The quality of every class, in the order of the JSON's categories."""
    return [_class_quality(counts[category["id"]], category) for category in categories]


def _class_quality(counted: ClassCounts, category: Mapping[str, Any]) -> ClassQuality:
    kind = "thing" if category["isthing"] == 1 else "stuff"
    iou, tp, fp, fn = counted
    if not tp + fp + fn:
        return ClassQuality(category["name"], kind, math.nan, math.nan, math.nan, tp, fp, fn)
    size = tp + 0.5 * fp + 0.5 * fn
    return ClassQuality(
        category["name"],
        kind,
        100 * (iou / size),
        100 * (iou / tp if tp else 0.0),
        100 * (tp / size),
        tp,
        fp,
        fn,
    )


def average_quality(
    counts: Mapping[int, ClassCounts],
    categories: Sequence[Mapping[str, Any]],
    name: str,
    isthing: bool | None,
) -> ClassQuality:
    """
    Mean over the classes of a group that occur in the ground truth or in the predictions.

    Args:
        counts: of every class.
        categories: the JSON's.
        name: of the group.
        isthing: the things, the stuff; None: all classes.
    """
    pq, sq, rq, num_classes = 0.0, 0.0, 0.0, 0
    total = [0, 0, 0]
    for category in categories:
        if isthing is not None and isthing != (category["isthing"] == 1):
            continue
        iou, tp, fp, fn = counts[category["id"]]
        if not tp + fp + fn:
            continue
        total = [a + b for a, b in zip(total, (tp, fp, fn), strict=True)]
        size = tp + 0.5 * fp + 0.5 * fn
        num_classes += 1
        pq += iou / size
        sq += iou / tp if tp else 0.0
        rq += tp / size
    if not num_classes:
        return ClassQuality(name, "mean", math.nan, math.nan, math.nan, *total)
    return ClassQuality(
        name,
        "mean",
        100 * (pq / num_classes),
        100 * (sq / num_classes),
        100 * (rq / num_classes),
        *total,
    )
