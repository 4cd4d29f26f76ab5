"""The module around the operator."""

import pytest
import torch
from deformable_inputs import SHAPES, loop

from psf.layers import MSDeformAttn, ms_deform_attn_fused_reference

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

    def test_parameter_names_are_those_of_released_checkpoints(self, module):
        projections = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        names = {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
        assert set(module.state_dict()) == names

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
    def test_sampling_locations(self, module, coordinates):
        """Offsets are pixels around points, and halves of the box divided by P around boxes."""
        query, reference, value, _ = self.arguments(coordinates=coordinates)
        offsets = module.sampling_offsets(query).view(2, 5, 4, 3, 2, 2)
        locations = torch.empty_like(offsets)
        for level, (h, w) in enumerate(SHAPES):
            point = reference[:, :, None, level, None]  # (N, Q, 1, 1, 2 or 4)
            unit = torch.tensor([1 / w, 1 / h]) if coordinates == 2 else point[..., 2:] / 2 / 2
            locations[:, :, :, level] = point[..., :2] + offsets[:, :, :, level] * unit
        weights = module.attention_weights(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 3, 2)
        values = module.value_proj(value).view(2, -1, 4, 3)
        expected = module.output_proj(loop(values, SHAPES, locations, weights))
        out = module(query, reference, value, SHAPES)
        torch.testing.assert_close(out, expected)
        tensor_shapes = torch.tensor(SHAPES)
        torch.testing.assert_close(module(query, reference, value, tensor_shapes), out)

    def test_padding_is_not_seen(self, module):
        query, reference, value, shapes = self.arguments()
        mask = torch.rand(2, self.positions) < 0.3
        changed = torch.where(mask[..., None], 100.0, value)
        out = module(query, reference, value, shapes, mask)
        torch.testing.assert_close(module(query, reference, changed, shapes, mask), out)
        assert not torch.allclose(module(query, reference, value, shapes), out)

    def test_reference_points_stay_single_precision_under_autocast(self, module, device):
        """Only the linear layers and the value are rounded, not where the points are."""
        query, reference, value, shapes = self.arguments()
        with torch.autocast(device, torch.bfloat16):
            out = module(query, reference, value, shapes)
            split = (4, 3, 2)
            expected = module.output_proj(
                ms_deform_attn_fused_reference(
                    module.value_proj(value).unflatten(-1, (4, -1)),
                    shapes,
                    reference,
                    module.sampling_offsets(query).unflatten(-1, (*split, 2)),
                    module.attention_weights(query).unflatten(-1, split),
                )
            )
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, atol=0.05, rtol=0.02)

    def test_compiles_to_one_graph(self, module):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*self.arguments()), module(*self.arguments()))

    def test_bad_arguments(self, module):
        with pytest.raises(ValueError, match="10 and 4"):
            MSDeformAttn(dim=10, num_levels=1, num_heads=4)
        with pytest.raises((ValueError, RuntimeError), match=r"\[2, 5, 3, 3\]"):
            module(*self.arguments(coordinates=3))
