import pytest
import torch

from psf.modeling.criterion import Criterion, LossWeights, Targets, mask_queries
from psf.modeling.location_decoder import Locations
from psf.modeling.mask_decoder import DeepPredictions
from psf.modeling.matcher import Assignment, MaskMatchingWeights, MatchingWeights

NUM_QUERIES, NUM_THINGS, NUM_STUFF, LAYERS = 5, 3, 2, 2
CRITERION = Criterion(
    matching_weights=MatchingWeights(2, 5, 2),
    mask_matching=None,
    loss_weights=LossWeights(
        class_weight=2,
        stuff_class_weight=2,
        l1_weight=5,
        giou_weight=2,
        mask_weight=2,
        things_weight=1,
        stuff_weight=1,
    ),
    mask_loss_scale=2,
)


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


def predict(all_targets: list[Targets]) -> tuple[Locations, DeepPredictions, list, dict]:
    """Random predictions for the targets, with gradients, and their losses."""
    n = len(all_targets)
    locations = Locations(
        query=torch.zeros(n, NUM_QUERIES, 4),
        logits=torch.randn(LAYERS, n, NUM_QUERIES, NUM_THINGS, requires_grad=True),
        boxes=torch.rand(LAYERS, n, NUM_QUERIES, 4).requires_grad_(),
    )
    assignments = CRITERION.assign(locations, all_targets)
    wanted = mask_queries(assignments[-1], all_targets)
    predictions = DeepPredictions(
        thing_logits=leaf(LAYERS, n, NUM_QUERIES, NUM_THINGS),
        stuff_logits=leaf(LAYERS, n, NUM_STUFF),
        thing_maps=[[leaf(len(i), 2, 3) for i in wanted.things] for _ in range(LAYERS)],
        stuff_maps=[[leaf(len(i), 2, 3) for i in wanted.stuff] for _ in range(LAYERS)],
        activation=torch.sigmoid,
    )
    return (
        locations,
        predictions,
        assignments,
        CRITERION(locations, predictions, all_targets, assignments),
    )


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
    leaves = [locations.logits, locations.boxes]
    leaves += [predictions.thing_logits, predictions.stuff_logits]
    leaves += [m for layer in predictions.thing_maps + predictions.stuff_maps for m in layer]
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
    locations = Locations(torch.zeros(1, NUM_QUERIES, 4), logits, boxes)
    assignments = CRITERION.assign(locations, [target])
    assert assignments[0][0].query.tolist() == [2]
    maps = [[torch.full((1, 2, 2), 30.0)]]
    predictions = DeepPredictions(
        logits, torch.tensor([[[30.0, -30.0]]]), maps, maps, torch.sigmoid
    )
    losses = CRITERION(locations, predictions, [target], assignments)
    assert sum(losses.values()) < 1e-5


def test_masks_are_compared_with_their_own_targets():
    """A prediction equal to the thing's mask costs nothing in its place, much elsewhere."""
    target = targets([0], [1])
    left, right = torch.zeros(1, 8, 8).bool(), torch.zeros(1, 8, 8).bool()
    left[:, :, :4] = True
    right[:, :, 4:] = True
    target = target._replace(thing_masks=left, stuff_masks=right)
    assignments = [[Assignment(torch.tensor([3]), torch.tensor([0]))]]
    wanted = mask_queries(assignments[-1], [target])
    assert (wanted.things[0].tolist(), wanted.stuff[0].tolist()) == ([3], [1])
    locations = Locations(
        torch.zeros(1, NUM_QUERIES, 4),
        torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
        torch.rand(1, 1, NUM_QUERIES, 4),
    )
    maps = [[[mask.float() * 60 - 30]] for mask in (left, right)]
    losses = {}
    for name, (things, stuff) in (("right", maps), ("wrong", maps[::-1])):
        predictions = DeepPredictions(
            torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
            torch.zeros(1, 1, NUM_STUFF),
            things,
            stuff,
            torch.sigmoid,
        )
        losses[name] = CRITERION(locations, predictions, [target], assignments)
    # The predictions are upsampled twofold, hence not zero at the edge.
    assert losses["right"]["loss_thing_mask"] < 0.1 < 0.9 < losses["wrong"]["loss_thing_mask"]
    assert losses["right"]["loss_stuff_mask"] < 0.1 < 0.9 < losses["wrong"]["loss_stuff_mask"]


def test_batch_loss_is_the_mean_over_segments():
    """Sums over images, divided by all segments: independent images just add up."""
    cases = [targets([0, 1], [1]), targets([2], [0, 1])]
    locations, predictions, assignments, together = predict(cases)
    sums = dict.fromkeys(together, 0)
    for i, target in enumerate(cases):
        alone = CRITERION(
            Locations(*(x[:, i : i + 1] for x in (locations.logits, *locations[1:]))),
            DeepPredictions(
                *(logits[:, i : i + 1] for logits in predictions[:2]),
                *([layer[i : i + 1] for layer in maps] for maps in predictions[2:4]),
                torch.sigmoid,
            ),
            [target],
            [layer[i : i + 1] for layer in assignments],
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
    locations = Locations(
        torch.zeros(1, NUM_QUERIES, 4),
        torch.zeros(1, 1, NUM_QUERIES, NUM_THINGS),
        torch.full((1, 1, NUM_QUERIES, 4), 0.5),
    )
    assignments = [[Assignment(torch.tensor([1, 3]), torch.tensor([0, 1]))]]
    swapped = DeepPredictions(
        thing_logits=torch.zeros(0, 1, NUM_QUERIES, NUM_THINGS),
        stuff_logits=torch.zeros(1, 1, NUM_STUFF),
        thing_maps=[[torch.stack([right, left]).float()]],
        stuff_maps=[[torch.zeros(0, 8, 8)]],
        activation=torch.relu,
    )
    losses = {}
    for name, weights in (
        ("once", None),
        ("again", MaskMatchingWeights(MatchingWeights(4, 5, 2), 2)),
    ):
        criterion = Criterion(
            matching_weights=CRITERION.matching_weights,
            mask_matching=weights,
            loss_weights=CRITERION.loss_weights,
            mask_loss_scale=2,
        )
        losses[name] = criterion(locations, swapped, [target], assignments)
    assert losses["again"]["loss_thing_mask"] < 0.1 < 0.9 < losses["once"]["loss_thing_mask"]
    assert "loss_thing_class" not in losses["again"]


def test_stuff_classes_have_a_weight_of_their_own():
    case = [targets([0], [1])]
    locations, predictions, assignments, once = predict(case)
    weights = CRITERION.loss_weights._replace(stuff_class_weight=4)
    criterion = Criterion(
        matching_weights=CRITERION.matching_weights,
        mask_matching=None,
        loss_weights=weights,
        mask_loss_scale=2,
    )
    twice = criterion(locations, predictions, case, assignments)
    for name, loss in twice.items():
        factor = 2 if name.startswith("loss_stuff_class") else 1
        torch.testing.assert_close(loss, factor * once[name])
