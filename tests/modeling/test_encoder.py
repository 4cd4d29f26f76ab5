import pytest
import torch

from psf.modeling.encoder import InputProjection, TransformerEncoder
from psf.modeling.runtime import valid_sizes

DIM, SHAPES = 32, [(6, 8), (3, 4), (2, 2)]


@pytest.fixture
def encoder() -> TransformerEncoder:
    torch.manual_seed(0)
    return TransformerEncoder(
        dim=DIM,
        num_levels=3,
        num_layers=2,
        num_heads=4,
        num_points=2,
        feedforward_dim=48,
        dropout=0.1,
    ).eval()


def maps(batch_size: int, shapes=SHAPES) -> list[torch.Tensor]:
    return [torch.randn(batch_size, DIM, *shape) for shape in shapes]


def encode(encoder, feature_maps, valid_shapes):
    sizes, padded = valid_sizes(feature_maps, valid_shapes)
    return encoder(feature_maps, sizes, padded=padded)


def test_no_images(encoder):
    memory = encode(encoder, maps(0), [])
    assert memory.features.shape == (0, 64, DIM)


def test_tokens_of_all_levels(encoder):
    memory = encode(encoder, maps(2), [SHAPES, SHAPES])
    assert memory.features.shape == (2, 48 + 12 + 4, DIM)
    assert memory.padding_mask is None
    assert memory.spatial_shapes == SHAPES
    assert torch.equal(memory.valid_ratios, torch.ones(2, 3, 2))


def test_padding_changes_nothing_in_the_valid_part(encoder):
    small = [(4, 5), (2, 3), (1, 2)]
    alone = encode(encoder, own := maps(1, small), [small])
    padded = [torch.randn(2, DIM, *shape) for shape in SHAPES]  # noise in the padding
    for level, (h, w) in enumerate(small):
        padded[level][0, :, :h, :w] = own[level][0]
    together = encode(encoder, padded, [small, SHAPES])
    assert together.valid_ratios[0, 0].tolist() == pytest.approx([5 / 8, 4 / 6])
    valid = ~together.padding_mask[0]
    assert valid.sum() == 4 * 5 + 2 * 3 + 1 * 2
    torch.testing.assert_close(together.features[0, valid], alone.features[0], atol=1e-5, rtol=1e-5)
    assert together.features.isfinite().all()


def test_position_tells_equal_pixels_apart(encoder):
    constant = [torch.ones(1, DIM, *shape) for shape in SHAPES]
    memory = encode(encoder, constant, [SHAPES])
    assert memory.features[0, 0].ne(memory.features[0, 20]).any()


def test_wrong_number_of_maps(encoder):
    with pytest.raises(ValueError, match="expected 3 feature maps, got 2"):
        encode(encoder, maps(1)[:2], [SHAPES[:2]])


def test_input_projection_maps_every_level_to_the_same_channels():
    projection = InputProjection([4, 8], DIM, 2)
    out = projection([torch.randn(2, 4, 6, 8), torch.randn(2, 8, 3, 4)])
    assert [x.shape for x in out] == [(2, DIM, 6, 8), (2, DIM, 3, 4)]


def test_input_projection_adds_coarser_levels():
    """The first of the backbone's coarsest map itself, the next of that level."""
    projection = InputProjection([4, 8], DIM, 4)
    maps = [torch.randn(2, 4, 6, 7), torch.randn(2, 8, 3, 4)]
    out = projection(maps)
    assert [x.shape[-2:] for x in out] == [(6, 7), (3, 4), (2, 2), (1, 1)]
    torch.testing.assert_close(out[2], projection[2](maps[1]))
    torch.testing.assert_close(out[3], projection[3](out[2]))
    assert projection[2][0].in_channels == 8


def test_the_finest_levels_of_a_memory(encoder):
    small = [(4, 5), (2, 3), (1, 2)]
    memory = encode(encoder, maps(2), [small, SHAPES])
    finest = memory.finest(2)
    assert finest.spatial_shapes == SHAPES[:2]
    assert torch.equal(finest.valid_ratios, memory.valid_ratios[:, :2])
    assert finest.features.shape == (2, 48 + 12, DIM)
    assert torch.equal(finest.padding_mask, memory.padding_mask[:, :60])
    assert memory.finest(3).features.shape == memory.features.shape
