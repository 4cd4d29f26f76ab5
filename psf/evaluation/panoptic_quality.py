"""Panoptic quality, bit for bit as panopticapi's ``pq_compute_single_core``.

Each image is reduced to an :class:`ImageRecord` of one or two KB. The records are added up in the
order of the annotations, so the result depends neither on the number of processes nor on their
order.

Rules of panopticapi that the paper (Kirillov et al., 2019) does not mention are kept: if a category
has several crowd segments in an image, only the last one excuses predictions; pixels whose id the
ground-truth JSON lacks are neither void nor segment. Unlike panopticapi, a group of classes without
any segment has quality NaN, and areas of the ground truth are counted in the PNG; where the JSON
differs is recorded.

Shapes: H x W pixels of an image.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

VOID = 0

# Width of a segment's boundary in parts of the image's diagonal (Boundary IoU, arXiv 2103.16562,
# section 5; its code for COCO panoptic).
_BOUNDARY_WIDTH = 0.02

Overlaps = dict[tuple[int, int], int]  # pixels of each pair (ground-truth id, predicted id)


class TruthSegment(NamedTuple):
    """A segment of the ground truth."""

    category_id: int  # of the data set
    area: float  # as the JSON says; NaN: it does not
    iscrowd: bool


class ImageRecord(NamedTuple):
    """Matches, false positives and false negatives of an image, by category id."""

    image_id: Any
    matches: tuple[tuple[int, float], ...]  # category and IoU, by rising ids of the two segments
    false_positives: tuple[int, ...]
    false_negatives: tuple[int, ...]
    wrong_areas: tuple[tuple[int, float, int], ...] = ()  # segment, area in the JSON, in the PNG


class ClassCounts(NamedTuple):
    """Sums over the images, of one class."""

    iou: float
    tp: int
    fp: int
    fn: int

    @property
    def quality(self) -> tuple[float, float, float] | None:
        """PQ, SQ and RQ in 0..1; None: nothing was counted."""
        size = self.tp + 0.5 * self.fp + 0.5 * self.fn
        if not size:
            return None
        return self.iou / size, self.iou / self.tp if self.tp else 0.0, self.tp / size


class ClassQuality(NamedTuple):
    """Quality of a class, or the mean over a group of classes; NaN where nothing was counted."""

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
        boundary: for Boundary PQ, match by the lesser of the IoUs of masks and of boundaries.

    Raises:
        KeyError: ``pred`` and ``pred_ids`` have different segments.
        ValueError: the sizes differ.
    """
    if truth_ids.shape != pred_ids.shape:
        raise ValueError(
            f"Image {image_id!r}: the prediction is {pred_ids.shape} but the ground truth "
            f"{truth_ids.shape} pixels (height, width)."
        )
    overlaps = count_overlaps(truth_ids, pred_ids)
    truth_areas, pred_areas = _areas(overlaps, side=0), _areas(overlaps, side=1)
    _check_prediction(pred_areas.keys(), pred, image_id)
    ious = _ious(overlaps, truth, pred, truth_areas, pred_areas)
    if boundary and ious:
        ious = _limit_by_boundaries(ious, truth_ids, truth, pred_ids)
    matched = {pair: iou for pair, iou in ious.items() if iou > 0.5}
    truth_matched = {truth_id for truth_id, _ in matched}
    pred_matched = {pred_id for _, pred_id in matched}
    excused = _excused(overlaps, truth, pred)
    return ImageRecord(
        image_id,
        matches=tuple((pred[pred_id], iou) for (_, pred_id), iou in matched.items()),
        false_positives=tuple(
            category_id
            for i, category_id in pred.items()
            if i not in pred_matched and not excused[i] / pred_areas[i] > 0.5
        ),
        false_negatives=tuple(
            segment.category_id
            for i, segment in truth.items()
            if i not in truth_matched and not segment.iscrowd
        ),
        wrong_areas=_wrong_areas(truth, truth_areas),
    )


def _wrong_areas(
    truth: Mapping[int, TruthSegment], areas: Mapping[int, int]
) -> tuple[tuple[int, float, int], ...]:
    """Segments whose area in the JSON is not the one in the PNG; 0 where they are missing."""
    stated = {i: segment.area for i, segment in truth.items()}
    stated |= {i: 0 for i in areas if i not in truth and i != VOID}
    differ = ((i, area, areas.get(i, 0)) for i, area in stated.items() if area == area)
    return tuple(row for row in differ if row[1] != row[2])


def warn_of_areas(records: Iterable[ImageRecord], truth_json: object) -> None:
    """Log the segments whose area in the JSON is not the one in the PNG."""
    wrong = [(record.image_id, *row) for record in records for row in record.wrong_areas]
    if wrong:
        logger.warning(
            "'%s' and its PNGs differ in the area of %d segments, so they may be of different "
            "versions. PQ counts the PNGs' pixels. The first: image %r, segment %d has %g pixels "
            "in the JSON and %d in the PNG. tools/check_dataset.py --all lists them.",
            *(truth_json, len(wrong), *wrong[0]),
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
    # Segments are compact, so sorting the runs of equal pairs is faster than sorting the pixels.
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


def _check_prediction(ids: Iterable[int], pred: Mapping[int, int], image_id: Any) -> None:
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
    truth_areas: Mapping[int, int],
    pred_areas: Mapping[int, int],
) -> dict[tuple[int, int], float]:
    """The IoU of all pairs of segments of one category that overlap."""
    ious = {}
    for (truth_id, pred_id), intersection in overlaps.items():
        segment = truth.get(truth_id)
        if segment is None or segment.iscrowd or segment.category_id != pred.get(pred_id):
            continue
        in_void = overlaps.get((VOID, pred_id), 0)
        union = pred_areas[pred_id] + truth_areas[truth_id] - intersection - in_void
        ious[truth_id, pred_id] = intersection / union
    return ious


def _excused(
    overlaps: Overlaps, truth: Mapping[int, TruthSegment], pred: Mapping[int, int]
) -> dict[int, int]:
    """Pixels of each prediction in void and in the last crowd of its category."""
    crowds = {segment.category_id: i for i, segment in truth.items() if segment.iscrowd}
    excused = {}
    for pred_id, category_id in pred.items():
        excused[pred_id] = overlaps.get((VOID, pred_id), 0)
        if category_id in crowds:
            excused[pred_id] += overlaps.get((crowds[category_id], pred_id), 0)
    return excused


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
    # In a square with one id the least equals the greatest: two filters do for all segments what
    # Boundary IoU's code does with one erosion each. float32 is exact below 2^24.
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


def quality_rows(
    counts: Mapping[int, ClassCounts], categories: Sequence[Mapping[str, Any]]
) -> list[ClassQuality]:
    """The means over all classes, things and stuff, then every class in the JSON's order."""
    things = [c for c in categories if c["isthing"] == 1]
    stuff = [c for c in categories if c["isthing"] != 1]
    groups = (("all", categories), ("things", things), ("stuff", stuff))
    rows = [_mean_quality(name, [counts[c["id"]] for c in group]) for name, group in groups]
    for category in categories:
        kind = "thing" if category["isthing"] == 1 else "stuff"
        counted = counts[category["id"]]
        rows.append(_row(category["name"], kind, counted.quality, counted[1:]))
    return rows


def _mean_quality(name: str, group: Sequence[ClassCounts]) -> ClassQuality:
    """Mean over the classes that occur in the ground truth or in the predictions."""
    sums, totals, num_classes = np.zeros(3), np.zeros(3, dtype=np.int64), 0
    for counted in group:
        if counted.quality is not None:
            sums += counted.quality  # one after the other, as panopticapi
            totals += counted[1:]
            num_classes += 1
    quality = (sums / num_classes).tolist() if num_classes else None
    return _row(name, "mean", quality, totals.tolist())


def _row(
    name: str, kind: str, quality: Sequence[float] | None, counted: Sequence[int]
) -> ClassQuality:
    pq, sq, rq = [math.nan] * 3 if quality is None else [100 * value for value in quality]
    return ClassQuality(name, kind, pq, sq, rq, *counted)
