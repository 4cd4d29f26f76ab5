import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from random_input import make_input


@pytest.fixture(params=["joint", "decoupled"])
def tiny_cfg(request, tiny_cfg):
    """Everything here holds for both mask decoders."""
    if request.param == "decoupled":
        tiny_cfg.merge_from_list(
            [
                *("MODEL.PSF.MASK_DECODER.NAME", "decoupled"),
                *("MODEL.PSF.MASK_DECODER.THING_LAYERS", 1),
                *("MODEL.PSF.MASK_DECODER.STUFF_LAYERS", 2),
                *("MODEL.PSF.NUM_FEATURE_LEVELS", 4),
                *("MODEL.PSF.HIDDEN_DIM", 64),  # 32 groups of 1 channel cannot normalise 1 cell
            ]
        )
    return tiny_cfg


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    return build_model(tiny_cfg)


def outputs_on(cfg, **keys):
    for key, value in keys.items():
        cfg.MODEL.PSF.TEST[key] = value
    torch.manual_seed(0)
    return build_model(cfg).eval()


@torch.no_grad()
def predict(model, *inputs):
    return model.eval()(list(inputs))


ODD_INPUTS = {
    "no annotations": [],
    "only things": [0, 1, 2, 1],
    "only stuff": [3, 4],
    "more things than queries": [0, 1, 2] * 4,
    "everything": [0, 2, 3, 4],
}


@pytest.mark.parametrize("case", ODD_INPUTS)
@pytest.mark.parametrize("size", [(1, 1), (40, 60), (16, 320)])
def test_training_on_odd_images(model, case, size):
    losses = model([make_input(*size, ODD_INPUTS[case])])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: DDP would hang"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("thing_ids", "stuff_ids"),
    [({}, {20: 0, 40: 1}), ({10: 0, 30: 1}, {})],
    ids=["stuff", "things"],
)
def test_data_sets_with_one_kind_of_classes(tiny_cfg, thing_ids, stuff_ids):
    """Stuff only or things only: trained and predicted."""
    name = "tiny_things" if thing_ids else "tiny_stuff"
    MetadataCatalog.get(name).set(
        thing_dataset_id_to_contiguous_id=thing_ids,
        stuff_dataset_id_to_contiguous_id=stuff_ids,
        thing_classes=["one", "two"],
        stuff_classes=["one", "two"],
    )
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = (name,)
    tiny_cfg.MODEL.PSF.NUM_THING_CLASSES = tiny_cfg.MODEL.PSF.NUM_STUFF_CLASSES = 0
    model = outputs_on(tiny_cfg, INSTANCE_ON=True, SEMANTIC_ON=True)
    losses = model.train()([make_input(40, 60, [0, 1])])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    (output,) = predict(model, make_input(40, 60, []))
    assert output["sem_seg"].shape == (2, 40, 60)
    assert all(info["isthing"] == bool(thing_ids) for info in output["panoptic_seg"][1])
    assert (len(output["instances"]) > 0) == bool(thing_ids)


@pytest.mark.parametrize("size", [(1, 1), (40, 60), (16, 320)])
def test_prediction_of_odd_images(tiny_cfg, size):
    model = outputs_on(tiny_cfg, INSTANCE_ON=True, SEMANTIC_ON=True)
    (output,) = predict(model, make_input(*size, []))
    id_map, infos = output["panoptic_seg"]
    assert id_map.shape == size
    assert id_map.dtype == torch.int32
    assert set(id_map.unique().tolist()) - {0} == {info["id"] for info in infos}
    assert output["sem_seg"].shape == (5, *size)
    # Six queries, or their pairs with three classes.
    num_candidates = {"joint": 6, "decoupled": 18}[tiny_cfg.MODEL.PSF.MASK_DECODER.NAME]
    assert output["instances"].pred_masks.shape == (num_candidates, *size)


def test_outputs_follow_detectron2s_contract(tiny_cfg):
    model = outputs_on(tiny_cfg, INSTANCE_ON=True, SEMANTIC_ON=True)
    (output,) = predict(model, make_input(40, 60, [], height=80, width=90))
    id_map, infos = output["panoptic_seg"]
    assert id_map.shape == (80, 90)
    assert infos
    for info in infos:
        assert info["isthing"] == (info["category_id"] in (1, 3, 4))
        assert info["area"] == (id_map == info["id"]).sum() > 0
        assert 0 <= info["score"] <= 1
    instances = output["instances"]
    assert instances.image_size == (80, 90)
    assert set(instances.pred_classes.tolist()) <= {1, 3, 4}
    assert instances.scores.diff().le(0).all()
    assert output["sem_seg"].shape == (5, 80, 90)
    assert instances.pred_masks.dtype == torch.bool


def test_only_what_is_asked_for_is_returned(tiny_cfg):
    assert predict(outputs_on(tiny_cfg), make_input(32, 32, []))[0].keys() == {"panoptic_seg"}
    model = outputs_on(tiny_cfg, PANOPTIC_ON=False, SEMANTIC_ON=True)
    assert predict(model, make_input(32, 32, []))[0].keys() == {"sem_seg"}


def test_semantic_scores_stand_at_their_contiguous_ids(tiny_cfg):
    """Class scores of one class at a time light up the channel of its contiguous id."""
    model = outputs_on(tiny_cfg, SEMANTIC_ON=True)
    things, stuff = torch.eye(3), torch.ones(2)
    logits = torch.full((5, 4, 4), 100.0)
    by_class = model.semantic_scores(things, stuff, logits.sign(), (4, 4))[:, 0, 0]
    assert len(by_class.unique()) == 1
    circle = model.semantic_scores(things * torch.tensor([1.0, 0, 0]), stuff * 0, logits, (4, 4))
    assert circle[:, 0, 0].nonzero().tolist() == [[1]]


def test_neighbours_and_padding_change_no_prediction(tiny_cfg):
    model = outputs_on(tiny_cfg, INSTANCE_ON=True, SEMANTIC_ON=True)
    sizes = [(40, 60), (70, 33), (40, 60)]
    images = [make_input(*size, [], seed=i) for i, size in enumerate(sizes)]
    together = predict(model, *images)
    for image, output in zip(images, together, strict=True):
        (alone,) = predict(model, image)
        torch.testing.assert_close(alone["sem_seg"], output["sem_seg"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            alone["instances"].scores, output["instances"].scores, atol=1e-4, rtol=1e-4
        )
        differ = alone["panoptic_seg"][0] != output["panoptic_seg"][0]
        assert differ.float().mean() < 1e-3  # pixels at a threshold may fall on either side


def test_a_backbone_that_pads_its_images(tiny_cfg):
    """FPN needs multiples of 32: an image is padded by itself, and its padding is masked."""
    tiny_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    tiny_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    tiny_cfg.MODEL.FPN.OUT_CHANNELS = 32
    tiny_cfg.MODEL.PSF.IN_FEATURES = ["p3", "p4", "p5"]
    model = outputs_on(tiny_cfg, SEMANTIC_ON=True)
    small, large = make_input(70, 90, []), make_input(128, 128, [])
    maps, valid_shapes = model.extract_features(model.preprocess_images([small, large]))
    shapes, small_shapes = [(16, 16), (8, 8), (4, 4), (2, 2)], [(9, 12), (5, 6), (3, 3), (2, 2)]
    assert [tuple(m.shape[-2:]) for m in maps] == shapes[: len(maps)]
    assert valid_shapes == [small_shapes[: len(maps)], shapes[: len(maps)]]
    together = predict(model, small, large)
    (alone,) = predict(model, small)
    torch.testing.assert_close(alone["sem_seg"], together[0]["sem_seg"], atol=1e-4, rtol=1e-4)


def test_neighbours_and_padding_change_no_loss(model):
    """Sums over images divided by all segments: four of five and one of five here."""
    first = make_input(40, 60, [0, 1, 3, 4], seed=1)
    second = make_input(65, 37, [2, 3, 4, 0], seed=2)
    together, one, two = model([first, second]), model([first]), model([second])
    for name, loss in together.items():
        torch.testing.assert_close(loss, (one[name] + two[name]) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merging", ["mask_wise", "pixel_wise"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_inference_keys(tiny_cfg, merging, layers):
    model = outputs_on(tiny_cfg, MERGING=merging, MASK_DECODER_LAYERS=layers)
    assert predict(model, make_input(32, 32, []))[0]["panoptic_seg"][0].shape == (32, 32)


def test_mixed_precision(model):
    image = make_input(40, 60, [0, 3])
    exact = model([image])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([image])
        sum(losses.values()).backward()
        output = predict(model, image)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], atol=0.05, rtol=0.1)
    assert output[0]["panoptic_seg"][0].shape == (40, 60)


class TestCheckpoints:
    def save(self, model, path):
        torch.save({"model": model.state_dict()}, path)
        return str(path)

    def test_round_trip(self, model, tiny_cfg, tmp_path):
        path = self.save(model, tmp_path / "model.pth")
        other = build_model(tiny_cfg)
        DetectionCheckpointer(other).load(path)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_another_architecture_lists_the_names(self, model, tiny_cfg, tmp_path):
        path = self.save(model, tmp_path / "model.pth")
        tiny_cfg.MODEL.PSF.NUM_OBJECT_QUERIES = 9
        tiny_cfg.MODEL.PSF.MASK_DECODER.DEC_LAYERS = 1
        tiny_cfg.MODEL.PSF.MASK_DECODER.STUFF_LAYERS = 1
        with pytest.raises(
            ValueError,
            match=r"location_decoder\.query_embed\.weight.*mask_decoder\.(stuff\.)?layers\.1",
        ):
            DetectionCheckpointer(build_model(tiny_cfg)).load(path)

    def test_foreign_weights_are_refused(self, model, tmp_path):
        torch.save({"model": {"features.0.weight": torch.zeros(3)}}, tmp_path / "foreign.pth")
        with pytest.raises(ValueError, match=r"Not in the model: features\.0\.weight"):
            DetectionCheckpointer(model).load(str(tmp_path / "foreign.pth"))

    def test_a_backbone_alone_is_a_start(self, model, tmp_path):
        weights = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
        torch.save({"model": weights}, tmp_path / "backbone.pth")
        DetectionCheckpointer(model).load(str(tmp_path / "backbone.pth"))
        name, value = next(iter(weights.items()))
        assert torch.equal(model.state_dict()[name], value)


def test_renumbered_classes_change_nothing_but_labels(tiny_cfg):
    """The same classes under other contiguous ids: same segments, other category ids."""
    image = make_input(40, 60, [])
    before = predict(outputs_on(tiny_cfg), image)[0]["panoptic_seg"]
    model = outputs_on(tiny_cfg)
    model.class_map = model.class_map._replace(thing_ids=(7, 9, 11), stuff_ids=(8, 10))
    after = predict(model, image)[0]["panoptic_seg"]
    assert torch.equal(before[0], after[0])
    renumbered = dict(zip((1, 3, 4, 0, 2), (7, 9, 11, 8, 10), strict=True))
    expected = copy.deepcopy(before[1])
    for info in expected:
        info["category_id"] = renumbered[info["category_id"]]
    assert after[1] == expected
