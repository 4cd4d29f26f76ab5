"""Every step of inference against the authors' code: differences relative to the largest value."""

import pytest
import torch
from detectron2.modeling import build_model
from release_cases import (
    FULL_SEED,
    SOURCES,
    arrays,
    difference,
    load_seeded,
    nested,
    official_panoptic,
    release_cfg,
    small_model,
)

from psf.modeling.encoder import Memory
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_decoder import MatchedQueries
from psf.modeling.runtime import valid_sizes

# Reached: 2.8e-6 (mask maps), 1.2e-6 (all before them).
TOLERANCE = 1e-5
SHAPES = [(19, 26), (10, 13), (5, 7), (3, 4)]  # of the four levels of a 149 x 203 image


@torch.no_grad()
def run(model, image) -> dict:
    """The results of every module for one image (H, W, 3) uint8."""
    found = {}

    def record(name):
        return lambda module, args, output: found.__setitem__(name, output)

    hooks = [
        layer.register_forward_hook(record(f"transformer/{name}_layer_{i}"))
        for name, part in (("enc", model.encoder), ("dec", model.location_decoder))
        for i, layer in enumerate(part.layers)
    ]
    (normalised,) = model.preprocess_images([{"image": image.permute(2, 0, 1)}])
    found["img"] = normalised
    for i, output in enumerate(model.backbone(normalised[None]).values()):
        found[f"backbone/{i}"] = output
    maps, valid_shapes = model.extract_features([normalised])
    found |= {f"neck/{i}": level for i, level in enumerate(maps)}
    sizes, padded = valid_sizes(maps, valid_shapes)
    found["memory"], found["locations"], found["outputs"] = model.transformer(maps, sizes, padded)
    found["valid_shapes"] = valid_shapes
    for hook in hooks:
        hook.remove()
    return found


def everything(num_things: int, num_stuff: int, batch_size: int = 1) -> MatchedQueries:
    things, stuff = torch.arange(num_things), torch.arange(num_stuff)
    return MatchedQueries([things] * batch_size, [stuff] * batch_size)


def mask_logits(model, found, queries, *, last_only):
    """Of things and of stuff, layers x N x (R, h, w)."""
    return model.mask_decoder.predict_masks(
        found["outputs"],
        found["locations"],
        found["memory"],
        found["valid_shapes"],
        queries,
        last_only=last_only,
    )


class TestSmallModel:
    @pytest.fixture
    def case(self, source):
        return arrays(source, "small/forward_A")

    @pytest.fixture
    def found(self, case):
        return run(small_model(), case["img_rgb_uint8/0"])

    def test_up_to_the_encoder(self, case, found):
        if "img" in case:
            assert difference(found["img"], case["img"][0]) == 0
        names = [k for k in case if k.startswith(("backbone/", "neck/"))]
        names += [k for k in case if k.startswith("transformer/enc_layer_")]
        assert len(names) >= 4
        for name in names:
            expected = case[name]
            if name.startswith("transformer"):
                expected = expected.transpose(0, 1)
            assert difference(found[name], expected) < TOLERANCE, name

    def test_location_decoder(self, case, found):
        for i in range(3):
            name = f"transformer/dec_layer_{i}"
            assert difference(found[name], case[name].transpose(0, 1)) < TOLERANCE
        decoder, locations = small_model().location_decoder, found["locations"]
        position = decoder.query_embed.weight.chunk(2, dim=-1)[0]
        reference = decoder.reference_points(position).sigmoid()[None]
        assert difference(reference, case["transformer/out_init_reference"]) < TOLERANCE
        assert difference(locations.pred_logits, case["location/all_cls_scores"]) < TOLERANCE
        assert difference(locations.pred_boxes, case["location/all_bbox_preds"]) < TOLERANCE

    @torch.no_grad()
    def test_masks_of_every_layer(self, case, found):
        model = small_model()
        thing_masks, stuff_masks = mask_logits(model, found, everything(20, 53), last_only=False)
        _, stuff_logits = model.mask_decoder.predict_classes(
            found["outputs"], found["locations"], last_only=False
        )
        queries = case["infer/0/topk_query_index"]
        things = nested(case, "infer/0/things/")
        stuff = nested(case, "infer/0/stuff/")
        compared = [
            (thing_masks[-1][0][queries], things["mask_tail"]),
            (stuff_masks[-1][0], stuff["mask_tail"]),
        ]
        for i, expected in nested(things, "mask_inter/").items():
            compared.append((thing_masks[int(i)][0][queries[:30]], expected))
        for i, expected in nested(stuff, "mask_inter/").items():
            compared.append((stuff_masks[int(i)][0], expected))
        for maps, expected in compared:
            assert difference(maps.flatten(1)[None], expected) < TOLERANCE
        for i, expected in nested(stuff, "cls_logits/").items():
            assert difference(stuff_logits[int(i)][..., None], expected) < TOLERANCE

    @torch.no_grad()
    def test_panoptic_map(self, case):
        image = case["img_rgb_uint8/0"].permute(2, 0, 1)
        height, width = case["infer/0/panoptic"].shape[:2]
        (output,) = small_model()([{"image": image, "height": height, "width": width}])
        panoptic = official_panoptic(output["panoptic_seg"])
        assert torch.equal(panoptic, case["infer/0/panoptic"])
        scores = sorted((info["score"] for info in output["panoptic_seg"][1]), reverse=True)
        expected = case["infer/0/merge/scores_all"].sort(descending=True).values
        assert all((expected - score).abs().min() < TOLERANCE for score in scores)


class TestPaddedBatch:
    """
    Two images of different size, padded together by the authors' code.

    Ours runs backbone and projection on each size apart, so the modules are given what the
    official ones got. Predictions for the padded image are the official ones in its valid part up
    to the mask decoder, which there attends to the padding (README, "Differences").
    """

    @pytest.fixture
    def case(self, source):
        return arrays(source, "small/forward_AB")

    @pytest.fixture
    def batch(self, case):
        """(2, 3, 149, 203): normalised, then padded with zeros on the right and at the bottom."""
        inputs = [{"image": case[f"img_rgb_uint8/{i}"].permute(2, 0, 1)} for i in (0, 1)]
        first, second = small_model().preprocess_images(inputs)
        batch = torch.zeros(2, *first.shape)
        batch[0] = first
        batch[1, :, : second.shape[1], : second.shape[2]] = second
        return batch

    @pytest.fixture
    def valid_shapes(self, case):
        masks = nested(case, "mlvl_masks/").values()
        return [[(int((~m[i, :, 0]).sum()), int((~m[i, 0]).sum())) for m in masks] for i in (0, 1)]

    @torch.no_grad()
    def test_encoder_and_location_decoder_at_valid_positions(self, case, batch, valid_shapes):
        model = small_model()
        if "img" in case:
            assert torch.equal(batch, case["img"])
        features = list(model.backbone(batch).values())
        levels = model.input_proj(features)
        for name, maps in (("backbone", features), ("neck", levels)):
            for i, expected in nested(case, f"{name}/").items():
                assert difference(maps[int(i)], expected) < TOLERANCE
        memory = model.encoder(levels, torch.tensor(valid_shapes).float(), padded=True)
        recorded_mask = case["transformer/enc_arg_query_key_padding_mask"]
        assert torch.equal(memory.padding_mask, recorded_mask)
        assert difference(memory.valid_ratios, case["transformer/enc_arg_valid_ratios"]) == 0
        expected = case["transformer/enc_layer_1"].transpose(0, 1)
        valid = ~memory.padding_mask
        assert difference(memory.features[valid], expected[valid]) < TOLERANCE
        locations = model.location_decoder(memory)
        assert difference(locations.query, case["args/query"]) < TOLERANCE
        assert difference(locations.pred_logits, case["location/all_cls_scores"]) < TOLERANCE
        assert difference(locations.pred_boxes, case["location/all_bbox_preds"]) < TOLERANCE

    @torch.no_grad()
    def test_mask_decoder_on_what_the_official_one_saw(self, case):
        """Of both images the whole padded memory, unmasked: the deviation switched off."""
        shapes = SHAPES[:3]
        num_positions = sum(h * w for h, w in shapes)
        features = case["transformer/enc_layer_1"].transpose(0, 1)[:, :num_positions]
        memory = Memory(features, None, shapes, torch.ones(2, 3, 2))
        logits = case["location/all_cls_scores"]
        locations = LocationPredictions(case["args/query"], logits, torch.zeros(0))
        model = small_model()
        found = {"memory": memory, "locations": locations, "valid_shapes": [shapes, shapes]}
        found["outputs"] = model.mask_decoder(memory, locations.query)
        (thing_masks,), (stuff_masks,) = mask_logits(
            model, found, everything(20, 53, 2), last_only=True
        )
        for image in (0, 1):
            if f"infer/{image}/topk_query_index" not in case:
                continue
            queries = case[f"infer/{image}/topk_query_index"]
            things, stuff = thing_masks[image][queries], stuff_masks[image]
            for maps, group in ((things, "things"), (stuff, "stuff")):
                expected = case[f"infer/{image}/{group}/mask_tail"][0]
                assert difference(maps.flatten(1), expected) < TOLERANCE


class TestFullSize:
    @torch.no_grad()
    def test_r50(self):
        case = arrays([*SOURCES.values()][-1], "full/r50")  # the recorded one has more arrays
        model = build_model(release_cfg("R50_24ep")).eval()
        load_seeded(model, FULL_SEED, nested(case, "override/"))
        found = run(model, case["img_rgb_uint8"])
        locations = found["locations"]
        compared = {
            "all_bbox_preds": locations.pred_boxes,
            "cls_scores_last": locations.pred_logits[-1],
            "hs_last": locations.query,
            "memory_without_last_level": found["memory"].finest(3).features,
            **{f"neck/{i}": found[f"neck/{i}"] for i in range(4)},
            **{f"backbone_first64ch/{i}": found[f"backbone/{i}"][:, :64] for i in range(3)},
        }
        for name, value in compared.items():
            if name in case:
                assert difference(value, case[name]) < TOLERANCE, name
        ((things,),), ((stuff,),) = mask_logits(model, found, everything(300, 53), last_only=True)
        pairs = locations.pred_logits[-1, 0].sigmoid().flatten().topk(100).indices
        assert torch.equal(pairs % 80, case["merge/labels"])
        things = things[pairs // 80]
        assert difference(things.flatten(1)[None], case["things/mask_tail"]) < TOLERANCE
        assert difference(stuff.flatten(1)[None], case["stuff/mask_tail"]) < TOLERANCE
        height, width = case["panoptic"].shape[:2]
        image = case["img_rgb_uint8"].permute(2, 0, 1)
        (output,) = model([{"image": image, "height": height, "width": width}])
        assert torch.equal(official_panoptic(output["panoptic_seg"]), case["panoptic"])
