import json
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from random_input import make_input
from torch import nn
from training_step import build_exact_model, odd_batch, take_step

from psf.solver import build_optimizer
from psf.trainer import Trainer, compile_layers, summary


class Losses(nn.Module):
    """A model with one parameter w and the losses a w and b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Parameter(torch.ones(())), a, b

    def forward(self, data):
        return {"loss_mask": self.w * self.a, "loss_class": self.w * self.b}


def step(model, **options):
    take_step(model, [], torch.optim.SGD(model.parameters(), lr=1.0), **options)


def test_a_step_clips_the_whole_gradient():
    model = Losses(3.0, 5.0)
    step(model, clip_norm=0.25)
    assert model.w.item() == pytest.approx(1 - 0.25)
    step(model)
    assert model.w.item() == pytest.approx(1 - 0.25 - 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_before_any_weight_changes(bad):
    model = Losses(1.0, bad)
    with pytest.raises(FloatingPointError, match=rf"iteration 3: loss_class = {bad}\.") as error:
        step(model)
    assert "--resume" in str(error.value)
    assert model.w.item() == 1


def test_mixed_precision_runs_on_this_device(tiny_cfg):
    model = build_model(tiny_cfg)
    before = next(model.parameters()).clone()
    optimizer = build_optimizer(tiny_cfg, model)
    data = [make_input(40, 60, [0, 3])]
    _, losses = take_step(model, data, optimizer, amp=True, clip_norm=0.1)
    assert not torch.equal(before, next(model.parameters()))
    assert "loss_thing_mask" in losses


@pytest.mark.parametrize("name", ["joint", "decoupled"])
def test_accumulated_gradients_are_those_of_the_batch(tiny_cfg, name):
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = name
    model = build_exact_model(tiny_cfg)
    expected, losses = take_step(model, odd_batch())
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for parts in (2, 4):
        found, found_losses = take_step(model, odd_batch(), accumulate_steps=parts)
        assert found_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
        for key, grad in expected.items():
            assert (found[key] - grad).norm() < 1e-5 * whole + 1e-4 * grad.norm(), key


def test_a_batch_that_cannot_be_split_is_refused(tiny_cfg):
    data = [make_input(64, 64, [0])] * 3
    with pytest.raises(ValueError, match=r"ACCUMULATE_STEPS is 2, but the batch .* has 3 images"):
        take_step(build_model(tiny_cfg).train(), data, accumulate_steps=2)


@pytest.mark.parametrize("name", ["joint", "decoupled"])
def test_compiled_layers_serve_all_sizes_and_numbers_of_masks(tiny_cfg, name, monkeypatch):
    """Each layer is one graph, and two batches of other sizes show all that varies."""
    psf = tiny_cfg.MODEL.PSF
    psf.MASK_DECODER.NAME = name
    decoder = psf.MASK_DECODER
    decoder.DEC_LAYERS = decoder.THING_LAYERS = decoder.STUFF_LAYERS = 1  # tracing takes time
    psf.LOCATION_DECODER.DEC_LAYERS = 1
    tiny_cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
    tiny_cfg.MODEL.RESNETS.DEPTH = 18
    model = build_model(tiny_cfg).train()
    pairs = [
        ((64, 96), [0, 3], [1, 2, 4]),
        ((64, 96), [0, 1, 2, 3, 4], [2, 3]),  # other numbers
        ((96, 128), [0], [1, 2, 3]),  # and other sizes
        # Where things have layers of their own, a single query (for images without things) needs
        # other graphs, as any size of 1 does.
        ((128, 96), [], [3]),
        ((128, 160), [0, 1, 2] * 3, []),  # more things than queries
    ]
    batches = [
        [make_input(*size, c, seed=i) for c in pair] for i, (size, *pair) in enumerate(pairs)
    ]
    expected = [take_step(model, batch) for batch in batches]
    graphs, numbers = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # The whole of a function, or an error.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    compile_layers(model)
    for batch, (grads, losses) in zip(batches, expected, strict=True):
        found, found_losses = take_step(model, batch)
        assert found_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
        for key, grad in grads.items():
            torch.testing.assert_close(found[key], grad, atol=1e-5, rtol=1e-3)
        numbers.append(len(graphs))
    torch._dynamo.reset()
    assert numbers[0] > 0
    if name == "joint":
        assert numbers[1] == numbers[0]
        assert numbers[3] == numbers[2]
    assert numbers[4] == numbers[3]


def test_compiling_without_a_compiler_says_what_to_do(tiny_cfg, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no 'no-such-compiler'.*SOLVER.COMPILE to False"):
        compile_layers(build_model(tiny_cfg))


def losses_of(cfg, iterations):
    """Total losses of the first iterations."""
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    found = []
    with EventStorage(0) as storage:
        for i in range(iterations):
            trainer.iter = storage.iter = i
            trainer.run_step()
            found.append(storage.latest()["total_loss"][0])
    return found


def test_the_same_seed_gives_the_same_losses(shapes_cfg):
    first = losses_of(shapes_cfg, 6)
    assert len(set(first)) == 6
    assert losses_of(shapes_cfg, 6) == first
    shapes_cfg.SEED += 1
    assert losses_of(shapes_cfg, 1) != first[:1]


def test_the_same_seed_gives_the_same_weights_and_predictions(shapes_cfg, tmp_path):
    shapes_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "MODEL.PSF.TEST.SAVE_PREDICTIONS", True])
    found = []
    for name in ("first", "second"):
        shapes_cfg.OUTPUT_DIR = str(tmp_path / name)
        seed_all_rng(shapes_cfg.SEED)
        Trainer(shapes_cfg).train()
        weights = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        files = (tmp_path / name / "inference").rglob("pred*/*.png")
        found.append((weights, {p.name: p.read_bytes() for p in files}))
    (weights, pngs), (weights_again, pngs_again) = found
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())
    assert len(pngs) == 4
    assert pngs == pngs_again


def test_training_leaves_everything_to_look_at(shapes_cfg, tmp_path):
    shapes_cfg.MODEL.PSF.TEST.INSTANCE_ON = shapes_cfg.MODEL.PSF.TEST.SEMANTIC_ON = True
    trainer = Trainer(shapes_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    output = tmp_path / "output"
    names = {path.name for path in output.iterdir()}
    assert {"metrics.json", "contact_sheet.png", "curves.png", "model_final.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any((output / "inference").rglob("pq*"))
    results = trainer.last_results
    assert {"panoptic_seg", "segm", "sem_seg"} <= results.keys()
    assert summary(results).startswith("PQ ")
    with (output / "metrics.json").open() as file:
        last = json.loads(file.readlines()[-1])
    assert last["panoptic_seg/PQ"] == results["panoptic_seg"]["PQ"]

    evaluated = Trainer.test(shapes_cfg, load_final(shapes_cfg, output))
    assert evaluated["panoptic_seg"] == results["panoptic_seg"], "--eval-only repeats the numbers"


def test_training_without_a_test_set_draws_the_curves_only(shapes_cfg, tmp_path):
    shapes_cfg.DATASETS.TEST = ()
    shapes_cfg.SOLVER.MAX_ITER = 2
    Trainer(shapes_cfg).train()
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert "curves.png" in names
    assert "contact_sheet.png" not in names


def test_a_picture_that_fails_costs_no_results(shapes_cfg, tmp_path, caplog):
    (name,) = shapes_cfg.DATASETS.TEST
    inference = Path("inference", name)
    pictures = [Path("contact_sheet.png"), Path("curves.png"), inference / "pq.png"]
    for picture in pictures:
        (tmp_path / "output" / picture).mkdir(parents=True)  # where a file is to be written
    trainer = Trainer(shapes_cfg)
    trainer.train()
    assert trainer.last_results["panoptic_seg"].keys() >= {"PQ"}
    assert (tmp_path / "output" / inference / "pq.txt").is_file()
    for picture in pictures:
        assert f"{picture}' is not drawn: IsADirectoryError" in caplog.text


FAULTS = {
    "null": lambda data: data.update(annotations=None),
    "missing": lambda data: data.pop("annotations"),
    "empty": lambda data: data.update(annotations=[]),
    "unknown class": lambda data: data["categories"][0].update(name="unknown"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_test_set_that_cannot_be_evaluated_is_noticed_at_the_start(
    shapes_cfg, register_changed, fault
):
    shapes_cfg.DATASETS.TEST = (register_changed("bare", fault),)
    with pytest.raises(ValueError, match=r"no annotations|is empty|is None|unknown"):
        Trainer(shapes_cfg)


def test_missing_data_root_names_the_file_and_the_variable(tiny_cfg):
    tiny_cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic",)
    with pytest.raises(FileNotFoundError, match=r"panoptic_train2017\.json.*DETECTRON2_DATASETS"):
        Trainer.build_train_loader(tiny_cfg)


def load_final(cfg, output):
    model = build_model(cfg)
    model.load_state_dict(torch.load(output / "model_final.pth", weights_only=False)["model"])
    return model


def test_summary_without_pq():
    assert summary({"sem_seg": {"mIoU": 3.0}}) is None
    line = summary({"panoptic_seg": {"PQ": 61.234, "PQ_th": 50.0, "PQ_st": 90.5, "SQ": 1.0}})
    assert line == "PQ 61.23 PQ_th 50.00 PQ_st 90.50"
