"""Fine-tuning on other classes: rows by hand, and a checkpoint in another data set's model."""

import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from psf.checkpoint import AUTHORS
from psf.data import ClassNames, panoptic_metadata
from psf.data.categories import COCO
from psf.finetuning import ClassCheckpointer, match_names, transfer_classes
from psf.predictor import inference_checkpointer
from psf.trainer import Trainer

HEAD = "mask_decoder.thing_heads.0.weight"
STUFF = "mask_decoder.stuff_query.weight"


def test_no_classes():
    assert match_names([], []) == ([], [], [])
    assert match_names(["cat"], []) == ([], [], ["cat"])


def test_names_match_whatever_their_case():
    matches = match_names(["Cat", "dog", "cat"], ["bird", "DOG ", "cat"])
    assert matches.rows == [None, 1, 0]
    assert matches.new == ["bird"]
    assert matches.unused == []


def test_rows_follow_the_names():
    weights = {
        HEAD: torch.tensor([[1.0], [2]]),
        STUFF: torch.tensor([[5.0]]),
        "other": torch.ones(1),
    }
    own = {HEAD: torch.tensor([[7.0], [8], [9]]), STUFF: torch.tensor([[3.0], [4]])}
    result = transfer_classes(
        weights,
        own,
        things=match_names(["a", "b"], ["b", "c", "a"]),
        stuff=match_names(["s"], ["t", "s"]),
    )
    assert result[HEAD].tolist() == [[2], [8], [1]]
    assert result[STUFF].tolist() == [[3], [5]]
    assert torch.equal(result["other"], weights["other"])
    assert own[HEAD].tolist() == [[7], [8], [9]]


THINGS, THING_ORDER = ["circle", "square", "star"], ["star", "circle", "square"]


@pytest.mark.parametrize(
    ("things", "message"),
    [
        (["star", "circle", "ring"], "thing classes missing: ring; .*only there: square"),
        (["star", "circle"], "thing classes only there: square"),
        ([*THINGS, "ring"], "thing classes missing: ring"),
    ],
)
def test_inference_refuses_a_checkpoint_of_other_classes(tiny_cfg, tmp_path, things, message):
    model = build_model(tiny_cfg)
    saver = ClassCheckpointer(model, str(tmp_path), class_names=ClassNames(THINGS, ["a", "b"]))
    saver.save("model")
    loader = ClassCheckpointer(model, class_names=ClassNames(things, ["a", "b"]), same_classes=True)
    with pytest.raises(ValueError, match=message):
        loader.load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (THINGS, "'classes' in the checkpoint: is "),
        ({"things": THINGS}, "'classes' in the checkpoint: lacks stuff"),
        ({"things": THINGS, "stuff": [1, 2]}, "'classes' in the checkpoint: stuff is "),
        ({"things": THINGS, "stuff": "ab"}, "'classes' in the checkpoint: stuff is "),
        ({"things": THINGS[:2], "stuff": ["a", "b"]}, r"names 2 classes, .* has 3 of this kind"),
        ({"things": THINGS, "stuff": ["a"]}, r"names 1 classes, .* has 2 of this kind \(mask_dec"),
        (None, r"WEIGHTS_DATASET names 4 classes, .* has 3 of this kind"),
    ],
)
def test_class_names_that_are_not_those_of_the_rows(tiny_cfg, tmp_path, classes, message):
    """A wrong count would give rows to other classes."""
    model = build_model(tiny_cfg)
    torch.save({"model": model.state_dict(), "classes": classes}, tmp_path / "model.pth")
    loader = ClassCheckpointer(
        model,
        class_names=ClassNames(THING_ORDER, ["a", "b"]),
        weights_class_names=ClassNames([*THINGS, "ring"], ["a", "b"]),
    )
    with pytest.raises(ValueError, match=message):
        loader.load(str(tmp_path / "model.pth"))


def test_inference_aligns_a_checkpoint_of_another_order(tiny_cfg, tmp_path):
    model, other = build_model(tiny_cfg), build_model(tiny_cfg)
    names = ClassNames(THINGS, ["a", "b"])
    ClassCheckpointer(model, str(tmp_path), class_names=names).save("model")
    loader = ClassCheckpointer(
        other, class_names=ClassNames(THING_ORDER, ["b", "a"]), same_classes=True
    )
    loader.load(str(tmp_path / "model.pth"))
    weights, found = model.state_dict(), other.state_dict()
    assert torch.equal(found[HEAD], weights[HEAD][[2, 0, 1]])
    assert torch.equal(found[STUFF], weights[STUFF][[1, 0]])


@pytest.mark.parametrize("converted", [True, False])
def test_the_released_models_have_the_classes_of_coco(tiny_cfg, tmp_path, converted):
    """In the order of its categories; their files do not say so."""
    metadata = MetadataCatalog.get("tiny_coco_classes")
    metadata.set(**panoptic_metadata(COCO[::-1]))
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = (metadata.name,)
    tiny_cfg.merge_from_list(["MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0])
    model, other = build_model(tiny_cfg).eval(), build_model(tiny_cfg).eval()
    origin = {"converted_from": AUTHORS[0].name} if converted else {}
    torch.save({"model": model.state_dict(), **origin}, tmp_path / "model.pth")
    inference_checkpointer(tiny_cfg, other).load(str(tmp_path / "model.pth"))
    found, expected = other.state_dict(), model.state_dict()
    for name, classes in ((HEAD, 80), (STUFF, 53)):
        order = torch.arange(classes)
        assert torch.equal(found[name], expected[name][order.flip(0) if converted else order])
    tiny_cfg.MODEL.PSF.WEIGHTS_DATASET = "tiny_interleaved"
    if not converted:
        with pytest.raises(ValueError, match=r"WEIGHTS_DATASET names 3 classes, .* has 80"):
            inference_checkpointer(tiny_cfg, other).load(str(tmp_path / "model.pth"))


@pytest.fixture
def other_classes(shapes_cfg, register_changed):
    """The shapes data set in another order, one thing renamed and one stuff class left out."""

    def change(data):
        data["categories"].reverse()
        by_name = {category["name"]: category for category in data["categories"]}
        by_name["star"]["name"] = "asterisk"
        sand = by_name["sand"]
        data["categories"].remove(sand)
        for annotation in data["annotations"]:
            for segment in annotation["segments_info"]:
                if segment["category_id"] == sand["id"]:
                    segment["category_id"] = by_name["sky"]["id"]

    shapes_cfg.merge_from_list(["MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0])
    return register_changed("other_classes", change)


@pytest.mark.parametrize("names_in_file", [True, False])
def test_a_checkpoint_of_other_classes(shapes_cfg, tmp_path, other_classes, caplog, names_in_file):
    (first,) = shapes_cfg.DATASETS.TRAIN
    torch.manual_seed(0)
    before = build_model(shapes_cfg)
    names = ClassNames.from_metadata(MetadataCatalog.get(first))
    saver = ClassCheckpointer(before, str(tmp_path), class_names=names if names_in_file else None)
    saver.save("first")

    shapes_cfg.DATASETS.TRAIN, shapes_cfg.DATASETS.TEST = (other_classes,), ()
    shapes_cfg.MODEL.WEIGHTS = str(tmp_path / "first.pth")
    if not names_in_file:
        with pytest.raises(ValueError, match=r"MODEL\.PSF\.WEIGHTS_DATASET"):
            Trainer(shapes_cfg).resume_or_load(resume=False)
        shapes_cfg.MODEL.PSF.WEIGHTS_DATASET = first
    trainer = Trainer(shapes_cfg)
    fresh = trainer.model.state_dict()[HEAD].clone()
    with caplog.at_level(logging.INFO, logger="psf"):
        trainer.resume_or_load(resume=False)
    messages = "\n".join(caplog.messages)
    assert "4 of the 5 thing classes. Randomly initialized: asterisk. Unused: star." in messages
    assert "4 of the 4 stuff classes. Randomly initialized: none. Unused: sand." in messages

    old, new = before.state_dict(), trainer.model.state_dict()
    ours = ClassNames.from_metadata(MetadataCatalog.get(other_classes))
    for row, name in enumerate(ours.things):
        expected = fresh[row] if name == "asterisk" else old[HEAD][names.things.index(name)]
        assert torch.equal(new[HEAD][row], expected)
    for row, name in enumerate(ours.stuff):
        assert torch.equal(new[STUFF][row], old[STUFF][names.stuff.index(name)])
    encoder = next(n for n in old if n.startswith("encoder"))
    assert torch.equal(new[encoder], old[encoder])
    shapes_cfg.SOLVER.MAX_ITER = 1
    trainer.max_iter = 1
    trainer.train()
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    assert saved["classes"] == {"things": ours.things, "stuff": ours.stuff}
