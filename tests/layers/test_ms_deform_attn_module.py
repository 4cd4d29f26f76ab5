"""The module around the operator."""

import pytest
import torch
from deformable_inputs import SHAPES, chain

from psf.layers import MSDeformAttn

pytestmark = pytest.mark.usefixtures("device")


class TestModule:
    dim = 12
    positions = sum(h * w for h, w in SHAPES)

    @pytest.fixture
    def module(self):
        torch.manual_seed(0)
        module = MSDeformAttn(dim=self.dim, num_levels=3, num_heads=4, num_points=2)
        for parameter in module.parameters():  # all different, so that each matters
            torch.nn.init.normal_(parameter, std=0.3)
        return module

    def arguments(self, queries=5, coordinates=2):
        torch.manual_seed(1)
        return (
            torch.randn(2, queries, self.dim),
            torch.rand(2, queries, 3, coordinates),
            torch.randn(2, self.positions, self.dim),
            SHAPES,
        )

    @pytest.mark.parametrize("coordinates", [2, 4])
    @pytest.mark.parametrize("queries", [0, 5])
    def test_output_shape(self, module, queries, coordinates):
        out = module(*self.arguments(queries, coordinates))
        assert out.shape == (2, queries, self.dim)

    def test_initial_offsets(self):
        """Four heads look right, down, left, up; point p + 1 pixels far, in every level."""
        module = MSDeformAttn(dim=8, num_levels=2, num_heads=4, num_points=3)
        offsets = module.sampling_offsets(torch.randn(8)).view(4, 2, 3, 2)
        for head, direction in enumerate([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)]):
            expected = torch.tensor(direction) * torch.tensor([[1.0], [2.0], [3.0]])
            torch.testing.assert_close(offsets[head], expected.expand(2, 3, 2))
        # Diagonal heads reach the corners of the square.
        module = MSDeformAttn(dim=8, num_levels=1, num_heads=8, num_points=1)
        torch.testing.assert_close(module.sampling_offsets.bias[2:4], torch.tensor([1.0, 1.0]))
        assert not module.attention_weights(torch.randn(8)).any()

    @pytest.mark.parametrize("coordinates", [2, 4])
    def test_projections_around_the_operator(self, module, coordinates):
        query, reference, value, _ = self.arguments(coordinates=coordinates)
        offsets = module.sampling_offsets(query).view(2, 5, 4, 3, 2, 2)
        logits = module.attention_weights(query).view(2, 5, 4, 3, 2)
        values = module.value_proj(value).view(2, -1, 4, 3)
        expected = module.output_proj(chain(values, SHAPES, reference, offsets, logits))
        torch.testing.assert_close(module(query, reference, value, SHAPES), expected)

    def test_padding_is_not_seen(self, module):
        query, reference, value, shapes = self.arguments()
        mask = torch.rand(2, self.positions) < 0.3
        changed = torch.where(mask[..., None], 100.0, value)
        out = module(query, reference, value, shapes, mask)
        torch.testing.assert_close(module(query, reference, changed, shapes, mask), out)
        assert not torch.allclose(module(query, reference, value, shapes), out)

    def test_bad_arguments(self, module):
        with pytest.raises(ValueError, match="10 and 4"):
            MSDeformAttn(dim=10, num_levels=1, num_heads=4)
        with pytest.raises((ValueError, RuntimeError), match=r"\[2, 5, 3, 3\]"):
            module(*self.arguments(coordinates=3))
