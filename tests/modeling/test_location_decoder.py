import pytest
import torch

from psf.modeling.encoder import Memory
from psf.modeling.location_decoder import LocationDecoder

DIM, SHAPES, QUERIES, CLASSES, LAYERS = 32, [(6, 8), (3, 4)], 7, 3, 3


@pytest.fixture
def decoder() -> LocationDecoder:
    torch.manual_seed(0)
    return LocationDecoder(
        dim=DIM,
        num_classes=CLASSES,
        num_queries=QUERIES,
        num_layers=LAYERS,
        num_heads=4,
        num_levels=2,
        num_points=2,
        feedforward_dim=48,
        dropout=0.1,
    ).eval()


def memory(batch_size: int) -> Memory:
    features = torch.randn(batch_size, 48 + 12, DIM)
    return Memory(features, None, SHAPES, torch.ones(batch_size, 2, 2))


@pytest.mark.parametrize("batch_size", [0, 2])
def test_shapes_and_ranges(decoder, batch_size):
    locations = decoder(memory(batch_size))
    assert locations.query.shape == (batch_size, QUERIES, DIM)
    assert locations.pred_logits.shape == (LAYERS, batch_size, QUERIES, CLASSES)
    assert locations.pred_boxes.shape == (LAYERS, batch_size, QUERIES, 4)
    assert locations.pred_boxes.ge(0).all()
    assert locations.pred_boxes.le(1).all()


def test_boxes_start_small_at_the_learned_points(decoder):
    """Before training the box heads give zero change, and sizes of sigmoid(-2)."""
    boxes = decoder(memory(1)).pred_boxes
    position = decoder.query_embed.weight[:, :DIM]
    points = decoder.reference_points(position).sigmoid()
    torch.testing.assert_close(boxes[0, 0, :, :2], points, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        boxes[0, 0, :, 2:], torch.full((QUERIES, 2), 0.1192), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(boxes[-1], boxes[0], atol=1e-3, rtol=0)


def test_queries_are_a_set(decoder):
    """Permuting the learned queries permutes everything that is predicted."""
    tokens, order = memory(2), torch.randperm(QUERIES)
    before = decoder(tokens)
    decoder.query_embed.weight.data = decoder.query_embed.weight.data[order]
    after = decoder(tokens)
    torch.testing.assert_close(after.query, before.query[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        after.pred_logits, before.pred_logits[:, :, order], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        after.pred_boxes, before.pred_boxes[:, :, order], atol=1e-5, rtol=1e-5
    )


def test_references_are_detached_between_layers(decoder):
    """The last layer's boxes give the first layer's box head no gradient."""
    decoder(memory(1)).pred_boxes[-1].sum().backward()
    assert decoder.box_heads[0][-1].bias.grad.eq(0).all()
    assert decoder.box_heads[-1][-1].bias.grad.abs().sum() > 0


def test_boxes_change_those_of_the_layer_before_in_logits(decoder):
    """Deformable DETR's refinement; a coordinate at the border counts as 1e-5 away from it."""
    deltas = []
    for head in decoder.box_heads:
        torch.nn.init.normal_(head[-1].weight, std=8.0)
        head.register_forward_hook(lambda module, args, output: deltas.append(output))
    boxes = decoder(memory(2)).pred_boxes
    assert boxes[:2].gt(1 - 1e-6).any(), "no coordinate at the border"
    for layer in (1, 2):
        before = boxes[layer - 1].double().clamp(1e-5, 1 - 1e-5)
        expected = (deltas[layer] + before.logit()).sigmoid()
        torch.testing.assert_close(boxes[layer].double(), expected, atol=1e-3, rtol=0)
