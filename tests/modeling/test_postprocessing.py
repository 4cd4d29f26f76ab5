import pytest
import torch
from plain_postprocessing import plain_mask_wise, plain_pixel_wise, plain_scores
from torch.utils._python_dispatch import TorchDispatchMode

from psf.modeling import postprocessing
from psf.modeling.mask_head import resize_masks
from psf.modeling.postprocessing import (
    MergingRules,
    SoftMasks,
    merge_mask_wise,
    merge_pixel_wise,
    segment_scores,
)

RULES = MergingRules(
    class_exponent=1,
    mask_exponent=2,
    score_threshold=0.25,
    thing_keep_fraction=0.6,
    stuff_keep_fraction=0.8,
    area_offset=0,
)
MERGERS = [merge_mask_wise, merge_pixel_wise]


def full(masks: torch.Tensor) -> SoftMasks:
    """Masks (R, H, W) that have the output's size already."""
    return SoftMasks(masks, torch.relu, tuple(masks.shape[1:]))


def rows(*spans: tuple[int, int], width: int = 10) -> SoftMasks:
    """Masks of one row: 0.9 in [start, stop), 0.1 elsewhere."""
    masks = torch.full((len(spans), 1, width), 0.1)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = 0.9
    return full(masks)


@pytest.mark.parametrize("merge", MERGERS)
def test_no_candidates(merge):
    none = torch.zeros(0)
    segments = merge(none, full(torch.zeros(0, 3, 4)), none.long(), 2, RULES)
    assert segments.id_map.tolist() == [[0] * 4] * 3
    assert segments.id_map.dtype == torch.int32
    assert segments.labels == segments.scores == segments.areas == segments.candidates == []


def test_scores_by_hand():
    """p = 0.8; pixels above 0.5 are 0.6 and 1.0, mean 0.8: 0.8 * 0.8^2. A mask below 0.5 gets 0."""
    masks = torch.tensor([[[0.6, 1.0, 0.5, 0.2]], [[0.5, 0.1, 0.0, 0.3]]])
    scores = segment_scores(torch.tensor([0.8, 0.9]), full(masks), RULES)
    torch.testing.assert_close(scores, torch.tensor([0.8 * 0.64, 0.0]))


@pytest.mark.parametrize("merge", MERGERS)
def test_better_segments_take_their_pixels_first(merge):
    """The thing covers pixels 0..5, the stuff 4..9, of which 4 of 6 are left: dropped."""
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([0, 2])
    segments = merge(scores, rows((0, 6), (4, 10)), labels, 2, RULES)
    assert segments.id_map.tolist() == [[1] * 6 + [0] * 4]
    assert (segments.labels, segments.candidates) == ([0], [0])
    kept = merge(scores, rows((0, 6), (4, 10)), torch.tensor([0, 1]), 2, RULES)
    assert kept.id_map.tolist() == [[1] * 6 + [2] * 4], "a thing may lose 40 % of its mask"


@pytest.mark.parametrize("merge", MERGERS)
def test_low_scores_are_dropped(merge):
    segments = merge(
        torch.tensor([0.24, 0.25]), rows((0, 5), (5, 10)), torch.tensor([0, 1]), 2, RULES
    )
    assert segments.id_map.tolist() == [[0] * 5 + [1] * 5]
    assert segments.labels == [1]
    assert segments.scores == [0.25]


def test_merging_its_own_result_changes_nothing():
    torch.manual_seed(0)
    masks, scores, labels = torch.rand(8, 6, 7), torch.rand(8) + 0.3, torch.randint(0, 4, (8,))
    rules = RULES._replace(thing_keep_fraction=0.1, stuff_keep_fraction=0.1)
    first = merge_mask_wise(scores, full(masks), labels, 2, rules)
    assert first.labels
    binary = torch.stack([first.id_map == i for i in range(1, len(first.labels) + 1)]).float()
    again = merge_mask_wise(
        torch.tensor(first.scores), full(binary), torch.tensor(first.labels), 2, rules
    )
    assert torch.equal(first.id_map, again.id_map)


def test_pixel_wise_gives_a_pixel_to_the_highest_mask():
    """Both claim pixel 1: mask-wise merging gives it to the better score, argmax does not."""
    masks = full(torch.tensor([[[0.9, 0.55, 0.0, 0.0]], [[0.0, 0.95, 0.95, 0.95]]]))
    scores, labels = torch.tensor([0.6, 0.5]), torch.tensor([0, 1])
    rules = RULES._replace(thing_keep_fraction=0.5)
    assert merge_mask_wise(scores, masks, labels, 2, rules).id_map.tolist() == [[1, 1, 2, 2]]
    assert merge_pixel_wise(scores, masks, labels, 2, rules).id_map.tolist() == [[1, 2, 2, 2]]


def test_the_released_codes_mean_of_a_mask():
    """Two pixels of 0.9: (0.9 + 0.9) / (2 + 1) = 0.6, squared, times 0.5."""
    masks = torch.tensor([[[0.9, 0.9, 0.1]]])
    rules = RULES._replace(area_offset=1)
    score = segment_scores(torch.tensor([0.5]), full(masks), rules)
    torch.testing.assert_close(score, torch.tensor([0.5 * 0.36]))


PAIRS = [(merge_mask_wise, plain_mask_wise), (merge_pixel_wise, plain_pixel_wise)]
ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu}


def blobs(number: int, generator: torch.Generator) -> torch.Tensor:
    """(R, 9, 11) mask logits with overlapping hills, some above the threshold and some not."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    place = torch.rand(number, 2, 1, 1, generator=generator) * torch.tensor([9, 11])[:, None, None]
    radius = 1 + 4 * torch.rand(number, 1, 1, generator=generator)
    distance = (y - place[:, 0]).square() + (x - place[:, 1]).square()
    height = 2 * torch.rand(number, 1, 1, generator=generator)
    return height * (1 - distance / radius**2) + 0.1 * torch.randn(
        number, 9, 11, generator=generator
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(("merge", "plain"), PAIRS)
@pytest.mark.parametrize("chunk", [1, 3 * 40 * 51, 2**26])
def test_merging_equals_the_obvious_way(merge, plain, activation, seed, chunk, monkeypatch):
    """Same map in every pixel, same segments, for masks of which one, three or all fit a chunk."""
    monkeypatch.setattr(postprocessing, "CHUNK_ON_CPU", chunk)
    generator = torch.Generator().manual_seed(seed)
    number = 25
    logits, labels = blobs(number, generator), torch.randint(0, 6, (number,), generator=generator)
    class_scores = torch.rand(number, generator=generator)
    rules = RULES._replace(
        class_exponent=1 + seed,
        score_threshold=0.1,
        thing_keep_fraction=0.5,
        area_offset=seed % 2,
    )
    masks = SoftMasks(logits, activation, (40, 51))
    resized = activation(resize_masks(logits, (40, 51)))
    expected_scores = plain_scores(class_scores, resized, rules)
    scores = segment_scores(class_scores, masks, rules)
    torch.testing.assert_close(scores, expected_scores)
    scores[3] = scores[7]  # equal scores keep their order
    id_map, kept = plain(scores, resized, labels, 3, rules)
    assert 1 < len(kept) < number
    segments = merge(scores, masks, labels, 3, rules)
    assert torch.equal(segments.id_map, id_map)
    assert segments.candidates == kept
    assert segments.labels == labels[kept].tolist()
    assert segments.scores == scores[kept].tolist()
    assert segments.areas == id_map.flatten().long().bincount()[1:].tolist()


@pytest.mark.parametrize("wanted", [[], [4, 0]])
def test_foreground_of_some_masks(wanted):
    logits = blobs(5, torch.Generator().manual_seed(0))
    foreground = SoftMasks(logits, torch.sigmoid, (20, 30)).foreground(
        torch.tensor(wanted, dtype=torch.int64)
    )
    assert torch.equal(foreground, resize_masks(logits, (20, 30)).sigmoid()[wanted] > 0.5)
    assert foreground.shape == (len(wanted), 20, 30)


class Watch(TorchDispatchMode):
    """Counts what waits for the device, and the largest result."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.waits += [name] if name in self.WAITING else []
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("merge", MERGERS)
def test_number_of_segments_costs_neither_waits_nor_memory(merge, monkeypatch):
    """4 or 40 kept segments: the same number of waits, and no tensor larger than a chunk."""
    size, chunk = (64, 80), 2 * 64 * 80
    monkeypatch.setattr(postprocessing, "CHUNK_ON_CPU", chunk)
    waits = []
    for number in (4, 40):
        logits = torch.full((number, 1, 40), -3.0)
        logits[torch.arange(number), 0, torch.arange(number)] = 3.0
        labels, scores = torch.zeros(number, dtype=torch.int64), torch.rand(number) + 1
        masks = SoftMasks(logits, torch.sigmoid, size)
        with Watch() as watch:
            segment_scores(scores, masks, RULES)
            segments = merge(scores, masks, labels, 2, RULES)
        assert len(segments.labels) == number
        assert watch.largest <= chunk
        waits.append(watch.waits)
    assert waits[0] == waits[1]
