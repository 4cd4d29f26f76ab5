"""Equality with panopticapi to the last bit, on random maps and on each of its rules."""

import contextlib
import io
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

from psf.evaluation.panoptic_quality import (
    ImageRecord,
    TruthSegment,
    add_up,
    compare,
    quality_rows,
)

CATEGORIES = [{"id": i, "name": str(i), "isthing": int(i % 2)} for i in (3, 4, 7, 20, 21)]
BY_ID = {c["id"]: c for c in CATEGORIES}


class Pair:
    """An image's ground truth and prediction, in the form of panopticapi."""

    def __init__(self, truth_ids, truth, pred_ids, pred):
        self.truth_ids, self.pred_ids = np.array(truth_ids), np.array(pred_ids)
        self.truth = [
            {"area": int((self.truth_ids == i).sum()), "id": i, "category_id": c, "iscrowd": crowd}
            for i, c, crowd in truth
        ]
        self.pred = [{"id": i, "category_id": c} for i, c in pred]

    def record(self, image_id=0, boundary=False) -> ImageRecord:
        return compare(
            self.truth_ids.astype(np.uint32),
            {
                s["id"]: TruthSegment(s["category_id"], s["area"], s["iscrowd"] == 1)
                for s in self.truth
            },
            self.pred_ids.astype(np.uint32),
            {s["id"]: s["category_id"] for s in self.pred},
            image_id=image_id,
            boundary=boundary,
        )

    def annotations(self, folder: Path, i: int):
        """What panopticapi reads of this pair."""
        for kind, ids in (("truth", self.truth_ids), ("pred", self.pred_ids)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(id2rgb(ids)).save(folder / kind / f"{i}.png")
        common = {"image_id": i, "file_name": f"{i}.png"}
        return {**common, "segments_info": self.truth}, {
            **common,
            "segments_info": [dict(s) for s in self.pred],
        }


def reference(pairs, folder):
    annotations = [pair.annotations(folder, i) for i, pair in enumerate(pairs)]
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore"):
        return pq_compute_single_core(
            0, annotations, str(folder / "truth"), str(folder / "pred"), BY_ID
        )


def assert_equals_panopticapi(pairs, folder):
    expected = reference(pairs, folder)
    counts = add_up((pair.record(i) for i, pair in enumerate(pairs)), BY_ID)
    for category_id in BY_ID:
        theirs = expected[category_id]
        assert counts[category_id] == (float(theirs.iou), theirs.tp, theirs.fp, theirs.fn)
    rows = quality_rows(counts, CATEGORIES)
    for group, isthing in zip(rows, (None, True, False), strict=False):
        if math.isnan(group.pq):
            with pytest.raises(ZeroDivisionError):
                expected.pq_average(BY_ID, isthing)
            continue
        means, by_class = expected.pq_average(BY_ID, isthing)
        assert (group.pq, group.sq, group.rq) == tuple(100 * means[k] for k in ("pq", "sq", "rq"))
        for row, category in zip(rows[3:], CATEGORIES, strict=True):
            if category["id"] in by_class and row.tp + row.fp + row.fn:
                assert row.pq == 100 * by_class[category["id"]]["pq"]


def random_pair(rng: np.random.Generator) -> Pair:
    """Patches: void, crowds (also two of one category), some absent from the JSON."""
    height, width = rng.integers(1, 30, 2)
    cells = rng.integers(0, 9, (rng.integers(1, 6), rng.integers(1, 6)))
    truth_ids = cv2.resize(cells.astype(np.uint8), (int(width), int(height)), interpolation=0)
    pred_ids = np.roll(truth_ids, rng.integers(0, 4), axis=rng.integers(2))
    noisy = rng.random(pred_ids.shape) < rng.choice([0, 0.1, 0.9])
    pred_ids = np.where(noisy, rng.integers(0, 9, pred_ids.shape), pred_ids)
    if rng.random() < 0.1:
        pred_ids[:] = 0
    ids = np.append(0, rng.choice(np.arange(1, 1 << 24), 8, replace=False))
    truth_ids, pred_ids = ids[truth_ids], ids[pred_ids]
    categories = dict(zip(ids.tolist(), rng.choice(list(BY_ID), 9).tolist(), strict=True))
    truth = [
        (i, categories[i], int(rng.random() < 0.3))
        for i in rng.permutation(np.unique(truth_ids)).tolist()
        if i and rng.random() < 0.95
    ]
    if rng.random() < 0.2:
        truth.append((int(ids[rng.integers(1, 9)]), 3, 0))  # perhaps without a pixel, or twice
    pred = [
        (i, categories[i] if rng.random() < 0.8 else int(rng.choice(list(BY_ID))))
        for i in rng.permutation(np.unique(pred_ids)).tolist()
        if i
    ]
    return Pair(truth_ids, truth, pred_ids, pred)


@pytest.mark.parametrize("seed", range(12))
def test_random_maps(tmp_path, seed):
    rng = np.random.default_rng(seed)
    assert_equals_panopticapi([random_pair(rng) for _ in range(6)], tmp_path)


def test_no_images():
    assert all(math.isnan(row.pq) for row in quality_rows(add_up([], BY_ID), CATEGORIES))


ROW = [1] * 6 + [0] * 4
RULES = {
    "void excuses": Pair([ROW], [(1, 3, 0)], [[5] * 4 + [6] * 6], [(5, 3), (6, 4)]),
    "half in void does not": Pair([ROW], [(1, 3, 0)], [[0] * 2 + [6] * 8], [(6, 4)]),
    "void shrinks the union": Pair([ROW], [(1, 3, 0)], [[5] * 10], [(5, 3)]),
    "IoU of exactly 0.5": Pair([[1] * 4], [(1, 3, 0)], [[0, 0, 5, 5]], [(5, 3)]),
    "crowd excuses its category": Pair([[1] * 4], [(1, 3, 1)], [[5, 5, 6, 6]], [(5, 3), (6, 4)]),
    "only the last of two crowds": Pair(
        [[1] * 4 + [2] * 4], [(1, 3, 1), (2, 3, 1)], [[5] * 4 + [6] * 4], [(5, 3), (6, 3)]
    ),
    "crowd that is not matched": Pair([[1] * 4], [(1, 3, 1)], [[5] * 4], [(5, 3)]),
    "pixels that the JSON lacks": Pair([[1] * 4 + [9] * 4], [(1, 3, 0)], [[5] * 8], [(5, 3)]),
    "empty prediction": Pair([ROW], [(1, 3, 0)], [[0] * 10], []),
    "empty ground truth": Pair([[0] * 4], [], [[5] * 4], [(5, 3)]),
    "segment without pixels": Pair([[1] * 4], [(1, 3, 0), (2, 4, 0)], [[5] * 4], [(5, 3)]),
}


@pytest.mark.parametrize("pair", RULES.values(), ids=RULES)
def test_rules(tmp_path, pair):
    assert_equals_panopticapi([pair], tmp_path)


def test_the_area_is_that_of_the_png():
    """Unlike panopticapi's; it would give an IoU of 4 / 5.5."""
    pair = Pair([[1] * 4 + [2] * 4], [(1, 3, 0)], [[5] * 4 + [0] * 4], [(5, 3)])
    pair.truth[0]["area"] = 5.5
    record = pair.record()
    assert record.matches == ((3, 1.0),)
    assert record.wrong_areas == ((1, 5.5, 4), (2, 0, 4))


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        ([], r"segment ids \[5\] that segments_info does not"),
        ([(5, 3), (6, 3)], r"\[6\].*no pixel"),
    ],
)
def test_map_and_segments_that_differ_are_refused_as_by_panopticapi(tmp_path, pred, message):
    pair = Pair([[1] * 4], [(1, 3, 0)], [[5] * 4], pred)
    with pytest.raises(KeyError), contextlib.redirect_stderr(io.StringIO()):
        reference([pair], tmp_path)
    with pytest.raises(KeyError, match=message):
        pair.record()


def test_sizes_that_differ():
    with pytest.raises(ValueError, match=r"\(1, 4\) but the ground truth \(1, 3\)"):
        Pair([[1] * 3], [(1, 3, 0)], [[5] * 4], [(5, 3)]).record()


# ------------------------------------------------------------------------------------ boundary


def boundary_of(mask: np.ndarray) -> np.ndarray:
    """Boundary IoU's definition: what erosion by 2 % of the diagonal removes."""
    times = max(1, round(0.02 * math.hypot(*mask.shape)))
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1]
    return mask & (eroded == 0)


@pytest.mark.parametrize("seed", range(6))
def test_boundary_matches_by_definition(seed):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 4, (3, 4)).astype(np.uint8)
    truth = cv2.resize(cells, (120, 90), interpolation=cv2.INTER_NEAREST)
    pred = np.roll(truth, rng.integers(0, 5), axis=1)
    infos = [(int(i), 3 + int(i) % 2, 0) for i in np.unique(truth) if i]
    pair = Pair(truth, infos, pred, [(i, c) for i, c, _ in infos if (pred == i).any()])
    matches = []
    for i, category, _ in infos:
        for j, other, _ in infos:
            if category != other:
                continue
            ious = []
            for change in (np.asarray, boundary_of):
                a, b = change(truth == i), change(pred == j)
                union = (a | b).sum() - (b & (truth == 0) & ~a).sum()
                ious.append((a & b).sum() / union)
            if min(ious) > 0.5:
                matches.append((category, min(ious)))
    assert pair.record(boundary=True).matches == tuple(matches)


def test_a_shifted_square_has_a_lower_boundary_quality():
    truth = np.zeros((200, 200), dtype=int)
    truth[50:150, 50:150] = 1
    pair = Pair(truth, [(1, 3, 0)], np.roll(truth, 1, axis=0) * 5, [(5, 3)])
    ((_, mask_iou),) = pair.record().matches
    ((_, boundary_iou),) = pair.record(boundary=True).matches
    assert boundary_iou < mask_iou
