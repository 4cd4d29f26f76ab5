import copy
import functools

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from PIL import Image
from random_input import make_input
from torch import nn

import psf
from psf import inference
from psf.inference import (
    ChunkedFeedForward,
    fast_preset,
    fold_frozen_batch_norms,
    optimize_for_inference,
)
from psf.layers import linear as linear_layers
from psf.layers.linear import ConvolutionalLinear
from psf.layers.transformer import FeedForward


def build(cfg, **keys):
    for key, value in keys.items():
        cfg.MODEL.PSF.TEST[key] = value
    torch.manual_seed(0)
    return build_model(cfg).eval()


@torch.no_grad()
def predict(model, *inputs):
    return model(list(inputs))


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
def test_feed_forward_network_in_parts(tokens, monkeypatch):
    monkeypatch.setattr(inference, "HIDDEN_VALUES", 5 * 6)
    torch.manual_seed(0)
    network = FeedForward(dim=4, hidden_dim=6, activation=nn.GELU)
    chunked = ChunkedFeedForward(network)
    assert chunked.rows == 5
    x = torch.randn(2, 4, tokens).transpose(1, 2)
    torch.testing.assert_close(chunked(x), network(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_normalisation_changes_nothing(bias):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(4)
    for buffer in (norm.weight, norm.bias, norm.running_mean):
        buffer.normal_()
    norm.running_var.uniform_(0.5, 2)
    layer = Conv2d(3, 4, 3, bias=bias, norm=norm, activation=torch.relu)
    plain = copy.deepcopy(layer)
    fold_frozen_batch_norms(nn.Sequential(layer))
    assert layer.norm is None
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), plain(x))


def test_normalisations_that_see_their_input_stay():
    layer = Conv2d(3, 4, 3, norm=nn.GroupNorm(2, 4))
    fold_frozen_batch_norms(nn.Sequential(layer))
    assert isinstance(layer.norm, nn.GroupNorm)


@pytest.mark.parametrize("name", ["joint", "decoupled"])
@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_an_optimised_model_predicts_the_same(tiny_cfg, name, norm, monkeypatch):
    monkeypatch.setattr(linear_layers, "LEAST_CHANNELS", 8)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 1)
    monkeypatch.setattr(inference, "HIDDEN_VALUES", 256)
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = name
    tiny_cfg.MODEL.RESNETS.NORM = norm
    images = [make_input(40, 60, [], seed=0), make_input(70, 33, [], seed=1)]
    expected = predict(build(tiny_cfg, SEMANTIC_ON=True, INSTANCE_ON=True), *images)
    model = optimize_for_inference(build(tiny_cfg))
    kinds = {type(module) for module in model.modules()}
    assert {ConvolutionalLinear, ChunkedFeedForward} <= kinds
    assert FrozenBatchNorm2d not in kinds
    for a, b in zip(predict(model, *images), expected, strict=True):
        torch.testing.assert_close(a["sem_seg"], b["sem_seg"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            a["instances"].scores, b["instances"].scores, atol=1e-4, rtol=1e-4
        )
        assert (a["panoptic_seg"][0] != b["panoptic_seg"][0]).float().mean() < 1e-3


def test_lower_precision_keeps_its_weights_in_it(tiny_cfg, monkeypatch):
    monkeypatch.setattr(linear_layers, "LEAST_CHANNELS", 8)
    monkeypatch.setattr(linear_layers, "LEAST_ROWS", 1)
    image = make_input(40, 60, [])
    expected = predict(build(tiny_cfg, SEMANTIC_ON=True), image)[0]["sem_seg"]
    model = optimize_for_inference(build(tiny_cfg, PRECISION="bfloat16"))
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight.dtype == torch.bfloat16
    assert model.encoder.layers[0].norm1.weight.dtype == torch.float32
    output = predict(model, image)[0]["sem_seg"]
    assert output.dtype == torch.float32
    # bfloat16 has 8 bits, and its errors add up over the layers.
    assert (output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("pad_to", [64, 128])
@pytest.mark.parametrize("name", ["joint", "decoupled"])
def test_padding_to_a_multiple_changes_nothing(tiny_cfg, name, pad_to):
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = name
    images = [make_input(40, 60, [], seed=0), make_input(70, 133, [], seed=1)]
    expected = predict(build(tiny_cfg, SEMANTIC_ON=True), *images)
    padded = predict(build(tiny_cfg, PAD_TO=pad_to), *images)
    for a, b in zip(padded, expected, strict=True):
        torch.testing.assert_close(a["sem_seg"], b["sem_seg"], atol=1e-4, rtol=1e-4)
        assert (a["panoptic_seg"][0] != b["panoptic_seg"][0]).float().mean() < 1e-3


def test_maps_are_padded_to_those_of_a_larger_image(tiny_cfg):
    model = build(tiny_cfg)
    images = model.preprocess_images([make_input(70, 133, [])])
    maps, _ = model.extract_features(images)
    padded = psf.modeling.runtime.pad_maps(maps, 64)
    assert [m.shape[-2:] for m in padded] == [(16, 24), (8, 12), (4, 6)]
    for own, larger in zip(maps, padded, strict=True):
        height, width = own.shape[-2:]
        assert torch.equal(larger[..., :height, :width], own)
        torch.testing.assert_close(larger.abs().sum(), own.abs().sum())


@pytest.mark.parametrize("name", ["joint", "decoupled"])
def test_compiled_is_one_graph_for_all_sizes(tiny_cfg, name, monkeypatch):
    """From feature maps to classes without a break: three programs, however many sizes."""
    decoder = tiny_cfg.MODEL.PSF.MASK_DECODER
    decoder.NAME = name
    decoder.DEC_LAYERS = decoder.THING_LAYERS = decoder.STUFF_LAYERS = 1  # tracing takes time
    tiny_cfg.MODEL.PSF.LOCATION_DECODER.DEC_LAYERS = 1
    plain, graphs = build(tiny_cfg, SEMANTIC_ON=True), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    compiled = build(tiny_cfg, COMPILE=True)
    for size in [(64, 64), (64, 96), (96, 128), (200, 130), (77, 88)]:
        image = make_input(*size, [])
        (output,), (expected,) = predict(compiled, image), predict(plain, image)
        torch.testing.assert_close(output["sem_seg"], expected["sem_seg"])
        assert (output["panoptic_seg"][0] != expected["panoptic_seg"][0]).float().mean() < 1e-3
    assert 1 <= len(graphs) <= 3


def test_the_fast_preset(tiny_cfg):
    fast = fast_preset(tiny_cfg).MODEL.PSF.TEST
    assert (fast.PRECISION, fast.MASK_DECODER_LAYERS, fast.COMPILE) == ("bfloat16", 2, True)
    assert tiny_cfg.MODEL.PSF.TEST.PRECISION == "float32"
    tiny_cfg.MODEL.PSF.MASK_DECODER.DEC_LAYERS = 1
    assert fast_preset(tiny_cfg).MODEL.PSF.TEST.MASK_DECODER_LAYERS == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("PRECISION", "int8", "PRECISION is 'int8'; known: .'bfloat16'"),
        ("PAD_TO", 100, "PAD_TO is 100; use a multiple of 64, or 0"),
    ],
)
def test_wrong_keys_name_the_mend(tiny_cfg, key, value, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_cfg, **{key: value})


class TestPredictor:
    @pytest.fixture
    def predictor(self, tiny_cfg, tmp_path):
        model = build(tiny_cfg)
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        tiny_cfg.INPUT.MIN_SIZE_TEST = 64
        return psf.Predictor(tiny_cfg, batch_size=2)

    @pytest.fixture
    def photos(self):
        random = np.random.default_rng(0)
        return [random.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(50, 60), (80, 40)] * 2]

    def test_no_images(self, predictor):
        assert predictor([]) == []

    def test_a_list_gives_what_its_images_give(self, predictor, photos):
        together = predictor(photos[:3])
        assert len(together) == 3
        for photo, output in zip(photos, together, strict=False):
            alone, _ = predictor(photo)["panoptic_seg"]
            assert alone.shape == photo.shape[:2]
            assert (alone != output["panoptic_seg"][0]).float().mean() < 1e-3

    @pytest.mark.parametrize(
        ("image", "found"),
        [
            (np.random.rand(8, 9, 3), r"float64 of shape \(8, 9, 3\)"),
            (np.zeros((8, 9), np.uint8), r"uint8 of shape \(8, 9\)"),
            (np.zeros((8, 9, 1), np.uint8), r"uint8 of shape \(8, 9, 1\)"),
            (np.zeros((0, 9, 3), np.uint8), r"uint8 of shape \(0, 9, 3\)"),
            (np.zeros((8, 9, 3), np.uint16), "uint16"),
            (torch.zeros(3, 8, 9), "a Tensor"),
            (Image.new("RGB", (9, 8)), "a Image"),
            ((i for i in ()), "a generator"),
        ],
    )
    def test_other_images_are_refused(self, predictor, photos, image, found):
        """None is predicted if one is wrong."""
        with pytest.raises(ValueError, match=rf"image 1 is {found}.*uint8.*read_image.*255"):
            predictor([photos[0], image])
        with pytest.raises(ValueError, match=rf"image 0 is {found}"):
            predictor(image)

    @pytest.mark.parametrize("size", [(20000, 2), (1, 4000), (4000, 1), (1, 1)])
    def test_extreme_shapes(self, predictor, size):
        """Resized, the shorter side would be 0."""
        predictor.aug.augmentation.max_size = 100
        panoptic_seg, _ = predictor(np.zeros((*size, 3), np.uint8))["panoptic_seg"]
        assert panoptic_seg.shape == size

    @pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
    def test_batch_sizes_that_would_predict_nothing(self, tiny_cfg, batch_size):
        with pytest.raises(ValueError, match=f"batch_size must be .* not {batch_size}"):
            psf.Predictor(tiny_cfg, batch_size=batch_size)

    def test_a_batch_size_of_numpy(self, predictor, tiny_cfg, photos):
        assert len(psf.Predictor(tiny_cfg, batch_size=np.int64(2))(tuple(photos))) == len(photos)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["DATASETS.TRAIN", (), "DATASETS.TEST", ()], r"DATASETS\.TEST are empty"),
            (["INPUT.FORMAT", "L"], r"INPUT\.FORMAT must be 'RGB' or 'BGR', not 'L'"),
            (["INPUT.MAX_SIZE_TEST", 0], r"INPUT\.MAX_SIZE_TEST is 0, but must be positive"),
        ],
    )
    def test_configs_that_cannot_work(self, tiny_cfg, options, message):
        tiny_cfg.merge_from_list(options)
        with pytest.raises(ValueError, match=message):
            psf.Predictor(tiny_cfg)

    def test_it_is_detectron2s_predictor(self, predictor, photos, tiny_cfg):
        """BGR in, resized, RGB to the model, as ``DefaultPredictor`` does it."""
        from detectron2.engine import DefaultPredictor

        expected, infos = DefaultPredictor(tiny_cfg)(photos[0])["panoptic_seg"]
        output, own_infos = predictor(photos[0])["panoptic_seg"]
        assert (output != expected).float().mean() < 1e-3
        assert [i["category_id"] for i in own_infos] == [i["category_id"] for i in infos]
