"""Post-processing alone against the authors' code: crafted and random masks."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from release_cases import arrays, difference, official_panoptic, small_model

from psf.modeling.candidates import best_thing_pairs
from psf.modeling.postprocessing import SoftMasks, segment_scores


@pytest.fixture(params=["crafted_r50", "crafted_pvt_swin", "random_0"])
def case(request, source):
    return arrays(source, f"merge/{request.param}")


@pytest.fixture
def model(case, monkeypatch):
    """A model with the thresholds of the case; only its post-processing is used."""
    model = small_model()
    options = model.inference_options
    quality, *_ = case["in/thresholds_quality_things_stuff_overlap_things_stuff"].tolist()
    changed = options._replace(
        rules=options.rules._replace(score_threshold=quality), instance_on=True
    )
    monkeypatch.setattr(model, "inference_options", changed)
    return model


@pytest.fixture
def output(case, model):
    masks = torch.cat([case["in/thing_masks"], case["in/stuff_masks"]])
    scores = case["in/cls_logits"].sigmoid(), case["in/stuff_logits"].sigmoid()
    candidates = model.inference_options.find_candidates(*scores)
    size = tuple(case["in/ori_shape"].tolist())
    return model.postprocess(candidates, masks[candidates.query], size)


def test_thresholds_of_overlap_are_those_of_the_config(case, model):
    rules = model.inference_options.rules
    _, _, things, stuff = case["in/thresholds_quality_things_stuff_overlap_things_stuff"].tolist()
    assert (rules.thing_keep_fraction, rules.stuff_keep_fraction) == (1 - things, 1 - stuff)


def test_panoptic_map_is_the_same_in_every_pixel(case, output):
    assert torch.equal(official_panoptic(output["panoptic_seg"]), case["out/panoptic"])


def test_scores_of_all_candidates(case, model):
    candidates = best_thing_pairs(
        case["in/cls_logits"].sigmoid(), case["in/stuff_logits"].sigmoid(), 100
    )
    assert torch.equal(candidates.labels[:100], case["mid/topk_labels"])
    maps = torch.cat([case["in/thing_masks"], case["in/stuff_masks"]])[candidates.query]
    masks = SoftMasks(maps, torch.relu, tuple(case["in/ori_shape"].tolist()))
    scores = segment_scores(candidates.class_scores, masks, model.inference_options.rules)
    assert difference(scores.sort(descending=True).values, case["mid/sorted_scores"]) < 1e-6


def test_instances(case, output):
    if "out/segm_things" not in case:
        pytest.skip("the masks of instances are not shipped")
    instances = output["instances"]
    scores = case["out/bbox_things"][:, 4]
    assert difference(instances.scores, scores) < 1e-6
    ids = MetadataCatalog.get("coco_2017_val_panoptic").thing_dataset_id_to_contiguous_id
    assert len(ids) == 80
    alone = (scores[:, None] == scores).sum(1) == 1  # equal scores may come in any order
    assert alone.sum() > 10
    assert torch.equal(instances.pred_classes[alone], case["out/labels_things"][alone])
    assert torch.equal(instances.pred_masks[alone], case["out/segm_things"][alone])
