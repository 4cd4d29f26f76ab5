"""Options mean what they say: they work, or are refused by name, or a line at the start warns."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog

from psf import precision
from psf.config import load_config
from psf.inference import fast_preset
from psf.options import check_training
from psf.precision import usable_precision
from psf.trainer import Trainer


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.AUG.ENABLED", True),
        ("VIS_PERIOD", 100),
        ("MODEL.RPN.NMS_THRESH", 0.5),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 5),
        ("MODEL.KEYPOINT_ON", True),
        ("DATASETS.PROPOSAL_FILES_TRAIN", ("a.pkl",)),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("SOLVER.MOMENTUM", 0.8),
        ("MODEL.RESNETS.DEPTH", 51),
        ("INPUT.FORMAT", "L"),
        ("SOLVER.WARMUP_METHOD", "cubic"),
        ("SOLVER.MAX_ITER", 0),
        ("SOLVER.BASE_LR", float("nan")),
        ("SOLVER.WARMUP_ITERS", -1),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
        ("SOLVER.EMA_DECAY", 1.0),
        ("SOLVER.STEPS", (2, 1)),
        ("SOLVER.STEPS", (1.5,)),
        ("SEED", 2**32),
        ("INPUT.MIN_SIZE_TRAIN", ()),
        ("INPUT.MIN_SCALE", 3.0),
        ("MODEL.PIXEL_MEAN", [1.0]),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]),
        ("MODEL.PSF.L1_WEIGHT", -1.0),
        ("MODEL.PSF.LOCATION_DECODER.DENOISING.LABEL_NOISE", 1.5),
        ("MODEL.PSF.LOCATION_DECODER.ONE_TO_MANY.REPEATS", 0),
        ("MODEL.PSF.MASK_POINTS.NUM_POINTS", 0),
        ("MODEL.PSF.TEST.SCORE_THRESHOLD", 50.0),
    ],
)
def test_options_that_would_not_be_obeyed(key, value):
    message = rf"in KEY VALUE pairs: {key} (has no effect: .*Leave it|is .*(known|must))"
    with pytest.raises(ValueError, match=message):
        load_config(opts=[key, value])


@pytest.mark.parametrize(
    ("options", "useless"),
    [
        (["MODEL.PSF.MASK_DECODER.THING_LAYERS", 2], "joint"),
        (["MODEL.PSF.MASK_DECODER.MATCHING.L1_WEIGHT", 1.0], "joint"),
        (["MODEL.PSF.MASK_DECODER.DEC_LAYERS", 2, "MODEL.PSF.MASK_DECODER.NAME", "decoupled"], ""),
        (["MODEL.PSF.TEST.SAVE_PREDICTIONS", True, "MODEL.PSF.TEST.PANOPTIC_ON", False], "False"),
        (["MODEL.SWIN.WINDOW_SIZE", 12], "build_resnet_backbone"),
        (["MODEL.FPN.OUT_CHANNELS", 12], "build_resnet_backbone"),
        (["INPUT.IMAGE_SIZE", 512], "multi_scale"),
        (["SOLVER.BASE_LR_END", 0.1], "WarmupMultiStepLR"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1], "False"),
        (["TEST.EVAL_PERIOD", 5], ": DATASETS.TEST is empty"),
    ],
)
def test_options_that_another_one_makes_useless(options, useless, caplog):
    load_config(opts=options)
    assert caplog.text.count("has no effect") == 1
    assert f"{options[0]} has no effect" in caplog.text
    assert useless in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.PSF.MASK_DECODER.THING_LAYERS", 2, "MODEL.PSF.MASK_DECODER.NAME", "decoupled"],
        ["MODEL.SWIN.WINDOW_SIZE", 12, "MODEL.BACKBONE.NAME", "build_swin_backbone"],
        ["MODEL.FPN.OUT_CHANNELS", 12, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
        ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4],
        ["INPUT.CROP.SIZE", [0.5, 0.5]],
    ],
)
def test_options_that_are_obeyed(options, caplog):
    load_config(opts=options)
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["INPUT.AUGMENTATION", "large_scale_jitter", "INPUT.CROP.ENABLED", True],
            r"CROP\.ENABLED has no effect with .*'large_scale_jitter'",
        ),
        *(
            (["INPUT.CROP.ENABLED", True, *crop], rf"CROP\.SIZE is .*; TYPE '.*' needs {needs}")
            for crop, needs in (
                (["INPUT.CROP.SIZE", [1.5, 1.5]], "two parts of the image"),
                (["INPUT.CROP.SIZE", [0.5]], "two parts of the image"),
                (["INPUT.CROP.TYPE", "absolute"], "height and width in pixels"),
                (["INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [9, 2]], "least, most"),
            )
        ),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "must be .* with MIN_SIZE_TRAIN_SAMPLING"),
        (["INPUT.AUGMENTATION", "fixed_crop"], r"CROP\.SIZE is \[0\.9, 0\.9\]; .*in pixels"),
        (["TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", 1.0]]], r"each entry is \[task, metric"),
        (["TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", "1", 1]]], r"each entry is \[task"),
        (["TEST.EXPECTED_RESULTS", [["segm", "AP", 1.0, 1.0]]], "turns on: panoptic_seg$"),
        (["TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", 1.0, 1.0]]], "is of one data set"),
    ],
)
def test_options_that_need_others(options, message):
    with pytest.raises(ValueError, match=message):
        load_config(opts=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.IMS_PER_BATCH", 3], "IMS_PER_BATCH is 3; it must be a multiple of the 2 proc"),
        (["VIS_PERIOD", 5], "VIS_PERIOD has no effect"),
    ],
)
def test_a_training_that_cannot_start(shapes_cfg, options, message):
    shapes_cfg.merge_from_list(options)
    with pytest.raises(ValueError, match=message):
        check_training(shapes_cfg, 2)


@pytest.mark.parametrize(("warmup", "warned"), [(3, False), (4, True), (100, True)])
def test_a_warmup_without_an_end(shapes_cfg, caplog, warmup, warned):
    shapes_cfg.SOLVER.WARMUP_ITERS = warmup
    check_training(shapes_cfg, 1)
    assert ("the learning rate never reaches SOLVER.BASE_LR" in caplog.text) == warned


def test_models_and_normalizations_that_the_trainer_cannot_use(shapes_cfg, caplog):
    shapes_cfg.TEST.PRECISE_BN.ENABLED = True
    Trainer(shapes_cfg)
    assert "TEST.PRECISE_BN.ENABLED has no effect" in caplog.text
    shapes_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="META_ARCHITECTURE is 'GeneralizedRCNN', not Panoptic"):
        Trainer.build_model(shapes_cfg)


@pytest.mark.parametrize("empty", [True, False])
def test_images_without_annotations_are_left_out_if_asked(shapes_cfg, caplog, empty, monkeypatch):
    """Detectron2's own filter looks for instance annotations, which panoptic data sets lack."""
    shapes_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = empty
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="psf"):
        (name,) = shapes_cfg.DATASETS.TRAIN
        records = DatasetCatalog.get(name)
        records[0]["segments_info"] = []
        records[1]["segments_info"] = [{**records[1]["segments_info"][0], "iscrowd": 1}]
        patch.setitem(DatasetCatalog.data, name, lambda: records)
        Trainer.build_train_loader(shapes_cfg)
    assert ("2 of 8 images without annotations are left out" in caplog.text) == empty


WITHOUT, WITH = "fpu sse avx512f", "fpu avx512f avx512_bf16"


@pytest.fixture(params=[WITHOUT, WITH, None])
def processor(request, tmp_path, monkeypatch):
    """Whether it has bfloat16; None is a system that does not say."""
    path = tmp_path / "cpuinfo"
    if request.param:
        path.write_text(f"processor\t: 0\nflags\t\t: {request.param}\n")
    monkeypatch.setattr(precision, "CPU_INFO", path)
    return request.param == WITH


def test_bfloat16_where_the_processor_has_it(tiny_cfg, shapes_cfg, processor, caplog):
    found = usable_precision("bfloat16", "cpu", "X.Y")
    assert found == ("bfloat16" if processor else "float32")
    line = "X.Y: this processor has no instructions for bfloat16"
    assert (line in caplog.text) != processor
    assert usable_precision("float32", "cpu", "X.Y") == "float32"
    assert found == fast_preset(tiny_cfg).MODEL.PSF.TEST.PRECISION
    shapes_cfg.SOLVER.AMP.ENABLED = True
    trainer = Trainer(shapes_cfg)
    assert trainer._trainer.amp == processor
    assert ("SOLVER.AMP.ENABLED: this processor" in caplog.text) != processor


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_of_gpus_that_only_emulate_it(native, monkeypatch, caplog):
    """A T4 or V100: torch supports it there, at a fraction of the speed."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert usable_precision("bfloat16", "cuda", "X.Y") == ("bfloat16" if native else "float32")
    assert ("X.Y: this GPU has no instructions for bfloat16" in caplog.text) != native
    assert usable_precision("float16", "cuda", "X.Y") == "float16"


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "which is no device of PyTorch"), ("cuda:63", "but there are .* CUDA devices")],
)
def test_devices_that_are_not_here(tiny_cfg, device, message):
    tiny_cfg.MODEL.DEVICE = device
    with pytest.raises(ValueError, match=f"MODEL.DEVICE is '{device}', {message}"):
        Trainer.build_model(tiny_cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.BACKBONE.NAME", "nope"], "MODEL.BACKBONE.NAME is 'nope'; known: .*build_resnet_b"),
        (
            ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "nope"],
            "MODEL.TIMM.NAME: timm has no network 'nope'",
        ),
    ],
)
def test_networks_that_do_not_exist(tiny_cfg, options, message):
    tiny_cfg.merge_from_list(options)
    with pytest.raises(ValueError, match=message):
        Trainer.build_model(tiny_cfg)
