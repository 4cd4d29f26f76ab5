"""Tools that look into models count the operator, too."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, flop_count_operators
from random_input import make_input
from torch.utils.flop_counter import FlopCounterMode

from psf.layers.ms_deform_attn import MSDeformAttn, has_extension

SHAPES = [(4, 6), (2, 3)]
# 2 images, 7 queries, 4 heads, 2 levels, 3 points; four cells of 8 channels a sample.
MACS = 2 * 7 * 4 * 2 * 3 * 4 * 8

pytestmark = pytest.mark.skipif(not has_extension(), reason="counts the operator of psf/_C.so")


@pytest.fixture
def attention():
    module = MSDeformAttn(dim=32, num_levels=2, num_heads=4, num_points=3)
    query, value = torch.randn(2, 7, 32), torch.randn(2, 30, 32)
    return module, (query, torch.rand(2, 7, 2, 2), value, SHAPES)


def counts(counter):
    names = counter.get_flop_counts()["Global"]
    return {str(op): number for op, number in names.items() if "ms_deform" in str(op)}


def test_pytorch_counts_forward_and_backward(attention):
    module, inputs = attention
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    assert counts(counter) == {
        "psf.ms_deform_attn_fused": 2 * MACS,
        "psf.ms_deform_attn_fused_backward": 2 * 2 * MACS,
    }


def test_detectron2_counts_all_that_the_model_computes(tiny_cfg):
    model, image = build_model(tiny_cfg).eval(), make_input(64, 96, [])
    analysis = FlopCountAnalysis(model, [{"image": image["image"]}])
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = analysis.by_operator()
    # Maps of 8 x 12, 4 x 6 and 2 x 3. 4 heads, 3 levels, 2 points, 8 channels.
    tokens, queries = 96 + 24 + 6, 6
    samples = (1 * tokens + 2 * queries) * 4 * 3 * 2
    assert by_operator["ms_deform_attn_fused"] == samples * 4 * 8
    # Two layers of 6 thing queries on each other, and two of these and 2 stuff queries on tokens.
    pairs = 2 * queries * queries + 2 * (queries + 2) * tokens
    assert by_operator["scaled_dot_product_attention"] == 2 * pairs * 32
    assert not {op for op in analysis.unsupported_ops() if "psf" in op or "attention" in op}
    assert flop_count_operators(model, [{"image": image["image"]}])["ms_deform_attn_fused"] > 0
