import re

import pytest
import torch
import tune_merging
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch.nn import functional as F

from psf.evaluation.ground_truth import load_ground_truth
from psf.modeling.candidates import Candidates
from psf.modeling.panoptic_segformer import PanopticSegFormer
from psf.modeling.postprocessing import MergingRules
from psf.trainer import Trainer


def imperfect(model, record):
    """The true segments of an image as candidates, some doubtful and some shifted."""
    ids, infos = load_ground_truth(record)
    infos = [info for info in infos if not info.get("iscrowd")]
    generator = torch.Generator().manual_seed(record["image_id"])
    labels, masks = [], []
    for info in infos:
        label = model.class_map.to_model(info["category_id"], is_thing=bool(info["isthing"]))
        mask = (ids == info["id"]).float()
        labels += [label, label]
        masks += [mask, mask.roll(12, 1)]
    logits = F.interpolate(torch.stack(masks)[None], size=(16, 16), mode="area")[0] * 8 - 4
    scores = torch.rand(len(labels), generator=generator)
    logits = (logits + torch.randn(logits.shape, generator=generator)).half().float()
    return Candidates(torch.arange(len(labels)), torch.tensor(labels), scores), logits, ids.shape


@pytest.fixture
def tuned_cfg(shapes_cfg, tmp_path, monkeypatch):
    """A config with weights; whatever they are, the model predicts imperfect segments."""
    records = {
        r["file_name"]: r for name in data_sets(shapes_cfg) for r in DatasetCatalog.get(name)
    }

    def forward(self, inputs):
        return [self.postprocess(*imperfect(self, records[x["file_name"]])) for x in inputs]

    monkeypatch.setattr(PanopticSegFormer, "forward", forward)
    shapes_cfg.MODEL.PSF.TEST.SCORE_THRESHOLD = 0.8  # too high
    shapes_cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    return shapes_cfg


def data_sets(cfg):
    return (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)


def run(cfg, tmp_path, dataset, capsys):
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--dataset", dataset]
    tune_merging.main(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("decoder", "merging"),
    [("joint", "mask_wise"), ("decoupled", "mask_wise"), ("joint", "pixel_wise")],
)
def test_the_printed_qualities_are_those_of_an_evaluation(
    tuned_cfg, tmp_path, capsys, monkeypatch, decoder, merging
):
    tuned_cfg.MODEL.PSF.MASK_DECODER.NAME = decoder
    tuned_cfg.MODEL.PSF.TEST.MERGING = merging
    monkeypatch.setattr(tune_merging, "THRESHOLDS", (0.2, 0.4, 0.6))
    grids = {"mask_exponent": (0.0, 1.0), "thing_keep_fraction": (0.3, 0.9)}
    keys = {field: tune_merging.KEYS[field] for field in ("score_threshold", *grids)}
    monkeypatch.setattr(tune_merging, "GRIDS", grids)
    monkeypatch.setattr(tune_merging, "KEYS", keys)
    (train,) = tuned_cfg.DATASETS.TRAIN
    printed = run(tuned_cfg, tmp_path, train, capsys)
    before, after = re.findall(r"^PQ .*$", printed, re.MULTILINE)

    tuned_cfg.DATASETS.TEST = (train,)
    assert quality_of(Trainer.test(tuned_cfg, build_model(tuned_cfg))) == before
    tuned_cfg.merge_from_list(printed.splitlines()[-1].split())
    assert quality_of(Trainer.test(tuned_cfg, build_model(tuned_cfg))) == after
    assert float(after.split()[1]) > float(before.split()[1]) > 0


def quality_of(results):
    values = results["panoptic_seg"]
    return str(tune_merging.Quality(values["PQ"], values["PQ_th"], values["PQ_st"]))


def test_a_test_set_and_other_mistakes_are_refused(tuned_cfg, tmp_path, capsys):
    (test,) = tuned_cfg.DATASETS.TEST
    with pytest.raises(SystemExit, match=rf"'{test}' is in DATASETS\.TEST"):
        run(tuned_cfg, tmp_path, test, capsys)
    with pytest.raises(SystemExit, match="There is no data set 'none'"):
        run(tuned_cfg, tmp_path, "none", capsys)
    (tmp_path / "config.yaml").write_text("MODEL:\n  WEIGHTS: ''\n")
    with pytest.raises(SystemExit, match="There are no weights"):
        tune_merging.main(["--config-file", str(tmp_path / "config.yaml"), "--dataset", test])


def test_the_images_are_evenly_spaced(tuned_cfg):
    torch.save({"model": build_model(tuned_cfg).state_dict()}, tuned_cfg.MODEL.WEIGHTS)
    (train,) = tuned_cfg.DATASETS.TRAIN
    for most, expected in [(3, [1, 3, 6]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (100, list(range(1, 9)))]:
        records = tune_merging.images_of(tuned_cfg, train, most)
        assert [record["image_id"] for record in records] == expected


def test_the_search_finds_a_joint_optimum_and_keeps_what_is_as_good():
    rules = MergingRules(1.0, 2.0, 0.25, 0.6, 0.8, 0)

    def measure(rules):
        exponent, fraction = rules.mask_exponent, rules.thing_keep_fraction
        pq = -abs(exponent - 3) - abs(fraction - 0.1 * exponent)
        values = {t: pq - abs(t - 0.1 * exponent) for t in (0.1, 0.2, 0.25, 0.3)}
        return {t: tune_merging.Quality(value, 0, 0) for t, value in values.items()}

    grids = {
        "mask_exponent": (1.0, 2.0, 3.0),
        "thing_keep_fraction": (0.2, 0.3),
        "stuff_keep_fraction": (0.1, 0.9),
    }
    best, quality = tune_merging.search(measure, rules, grids)
    assert best == MergingRules(1.0, 3.0, 0.3, 0.3, 0.8, 0)
    assert quality.pq == pytest.approx(0)
