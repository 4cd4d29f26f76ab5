import pytest
import torch

from psf.modeling.criterion import LossWeights, SetCriterion, Targets, matched_queries
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_decoder import MaskPredictions
from psf.modeling.matcher import MaskMatchingWeights, Matching, MatchingWeights

NUM_QUERIES, NUM_THINGS, NUM_STUFF, LAYERS = 5, 3, 2, 2
LOSS_WEIGHTS = LossWeights(
    class_weight=2,
    stuff_class_weight=2,
    l1_weight=5,
    giou_weight=2,
    mask_weight=2,
    things_weight=1,
    stuff_weight=1,
)


def build(**changes) -> SetCriterion:
    arguments = {
        "matching_weights": MatchingWeights(2, 5, 2),
        "mask_matching": None,
        "loss_weights": LOSS_WEIGHTS,
        "mask_loss_scale": 2,
        "mask_activation": torch.sigmoid,
    }
    return SetCriterion(**{**arguments, **changes})


CRITERION = build()


def targets(things: list[int], stuff: list[int], size=(16, 24)) -> Targets:
    generator = torch.Generator().manual_seed(10 * len(things) + len(stuff))
    return Targets(
        thing_labels=torch.tensor(things, dtype=torch.int64),
        thing_boxes=torch.rand(len(things), 4, generator=generator) / 2 + 0.1,
        thing_masks=torch.rand(len(things), *size, generator=generator) > 0.5,
        stuff_labels=torch.tensor(stuff, dtype=torch.int64),
        stuff_masks=torch.rand(len(stuff), *size, generator=generator) > 0.5,
    )


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def predict(all_targets: list[Targets]) -> tuple[LocationPredictions, MaskPredictions, list, dict]:
    """Random predictions for the targets, with gradients, and their losses."""
    n = len(all_targets)
    locations = LocationPredictions(
        query=torch.zeros(n, NUM_QUERIES, 4),
        pred_logits=torch.randn(LAYERS, n, NUM_QUERIES, NUM_THINGS, requires_grad=True),
        pred_boxes=torch.rand(LAYERS, n, NUM_QUERIES, 4).requires_grad_(),
    )
    matchings = CRITERION.match(locations, all_targets)
    wanted = matched_queries(matchings[-1], all_targets)
    predictions = MaskPredictions(
        thing_logits=leaf(LAYERS, n, NUM_QUERIES, NUM_THINGS),
        stuff_logits=leaf(LAYERS, n, NUM_STUFF),
        thing_masks=[[leaf(len(i), 2, 3) for i in wanted.things] for _ in range(LAYERS)],
        stuff_masks=[[leaf(len(i), 2, 3) for i in wanted.stuff] for _ in range(LAYERS)],
    )
    losses = CRITERION(locations, predictions, all_targets, matchings)
    return locations, predictions, matchings, losses


CASES = {
    "nothing": [targets([], [])],
    "only things": [targets([0, 2], [])],
    "only stuff": [targets([], [1])],
    "more things than queries": [targets([0, 1, 2, 0, 1, 2, 0], [0])],
    "mixed": [targets([], []), targets([1], [0, 1]), targets([2, 2], [])],
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_finite_and_reach_every_prediction(case):
    locations, predictions, _, losses = predict(CASES[case])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    leaves = [locations.pred_logits, locations.pred_boxes]
    leaves += [predictions.thing_logits, predictions.stuff_logits]
    leaves += [m for layer in predictions.thing_masks + predictions.stuff_masks for m in layer]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_names_follow_detr():
    *_, losses = predict(CASES["mixed"])
    location = {"loss_class", "loss_bbox", "loss_giou"}
    masks = {"loss_thing_class", "loss_stuff_class", "loss_thing_mask", "loss_stuff_mask"}
    assert losses.keys() == {name + suffix for name in location | masks for suffix in ("", "_0")}


def test_segments_that_are_not_there_cost_only_their_classes():
    *_, losses = predict(CASES["nothing"])
    assert losses["loss_thing_mask"] == losses["loss_stuff_mask"] == losses["loss_bbox"] == 0
    assert losses["loss_thing_class"] > 0
    assert losses["loss_stuff_class"] > 0


def test_losses_of_perfect_predictions_vanish():
    target = targets([1], [0], size=(4, 4))
    target = target._replace(
        thing_masks=torch.ones(1, 4, 4).bool(), stuff_masks=torch.ones(1, 4, 4).bool()
    )
    logits = torch.full((1, 1, NUM_QUERIES, NUM_THINGS), -30.0)
    logits[0, 0, 2, 1] = 30
    boxes = torch.rand(1, 1, NUM_QUERIES, 4)
    boxes[0, 0, 2] = target.thing_boxes[0]
    locations = LocationPredictions(torch.zeros(1, NUM_QUERIES, 4), logits, boxes)
    matchings = CRITERION.match(locations, [target])
    assert matchings[0][0].query.tolist() == [2]
    masks = [[torch.full((1, 2, 2), 30.0)]]
    predictions = MaskPredictions(logits, torch.tensor([[[30.0, -30.0]]]), masks, masks)
    losses = CRITERION(locations, predictions, [target], matchings)
    assert sum(losses.values()) < 1e-5


def test_masks_are_compared_with_their_own_targets():
    """A prediction equal to the thing's mask costs nothing in its place, much elsewhere."""
    target = targets([0], [1])
    left, right = torch.zeros(1, 8, 8).bool(), torch.zeros(1, 8, 8).bool()
    left[:, :, :4] = True
    right[:, :, 4:] = True
    target = target._replace(thing_masks=left, stuff_masks=right)
    matchings = [[Matching(torch.tensor([3]), torch.tensor([0]))]]
    wanted = matched_queries(matchings[-1], [target])
    assert (wanted.things[0].tolist(), wanted.stuff[0].tolist()) == ([3], [1])
    locations = LocationPredictions(
        torch.zeros(1, NUM_QUERIES, 4),
        torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
        torch.rand(1, 1, NUM_QUERIES, 4),
    )
    logits = [[[mask.float() * 60 - 30]] for mask in (left, right)]
    losses = {}
    for name, (things, stuff) in (("right", logits), ("wrong", logits[::-1])):
        predictions = MaskPredictions(
            torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
            torch.zeros(1, 1, NUM_STUFF),
            things,
            stuff,
        )
        losses[name] = CRITERION(locations, predictions, [target], matchings)
    # The predictions are upsampled twofold, hence not zero at the edge.
    assert losses["right"]["loss_thing_mask"] < 0.1 < 0.9 < losses["wrong"]["loss_thing_mask"]
    assert losses["right"]["loss_stuff_mask"] < 0.1 < 0.9 < losses["wrong"]["loss_stuff_mask"]


def test_batch_loss_is_the_mean_over_segments():
    """Sums over images, divided by all segments: independent images just add up."""
    cases = [targets([0, 1], [1]), targets([2], [0, 1])]
    locations, predictions, matchings, together = predict(cases)
    sums = dict.fromkeys(together, 0)
    for i, target in enumerate(cases):
        alone = CRITERION(
            LocationPredictions(locations.query, *(x[:, i : i + 1] for x in locations[1:3])),
            MaskPredictions(
                *(logits[:, i : i + 1] for logits in predictions[:2]),
                *([layer[i : i + 1] for layer in masks] for masks in predictions[2:]),
            ),
            [target],
            [layer[i : i + 1] for layer in matchings],
        )
        for name, loss in alone.items():
            sums[name] += loss * 3  # each image has three segments
    for name, loss in together.items():
        torch.testing.assert_close(loss, sums[name] / 6)


def test_masks_may_be_matched_again():
    """Two things with boxes and classes alike: a predicted mask is compared with its likeness."""
    target = targets([0, 0], [])
    left, right = torch.zeros(8, 8).bool(), torch.zeros(8, 8).bool()
    left[:, :4], right[:, 4:] = True, True
    target = target._replace(
        thing_boxes=torch.full((2, 4), 0.5),
        thing_masks=torch.stack([left, right]),
        stuff_masks=torch.zeros(0, 8, 8).bool(),
    )
    locations = LocationPredictions(
        torch.zeros(1, NUM_QUERIES, 4),
        torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
        torch.full((1, 1, NUM_QUERIES, 4), 0.5),
    )
    matchings = [[Matching(torch.tensor([1, 3]), torch.tensor([0, 1]))]]
    swapped = MaskPredictions(
        thing_logits=torch.zeros(0, 1, NUM_QUERIES, NUM_THINGS),
        stuff_logits=torch.zeros(1, 1, NUM_STUFF),
        thing_masks=[[torch.stack([right, left]).float()]],
        stuff_masks=[[torch.zeros(0, 8, 8)]],
    )
    losses = {}
    for name, weights in (
        ("once", None),
        ("again", MaskMatchingWeights(MatchingWeights(4, 5, 2), 2)),
    ):
        criterion = build(mask_matching=weights, mask_activation=torch.relu)
        losses[name] = criterion(locations, swapped, [target], matchings)
    assert losses["again"]["loss_thing_mask"] < 0.1 < 0.9 < losses["once"]["loss_thing_mask"]
    assert "loss_thing_class" not in losses["again"]


def test_stuff_classes_have_a_weight_of_their_own():
    case = [targets([0], [1])]
    locations, predictions, matchings, once = predict(case)
    criterion = build(loss_weights=LOSS_WEIGHTS._replace(stuff_class_weight=4))
    twice = criterion(locations, predictions, case, matchings)
    for name, loss in twice.items():
        factor = 2 if name.startswith("loss_stuff_class") else 1
        torch.testing.assert_close(loss, factor * once[name])
