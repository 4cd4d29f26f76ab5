"""The operator under the name and signature of Deformable DETR's, for other projects.

Where a project has ``MSDeformAttnFunction.apply(...)``, import this one in its place.
"""

from torch import Tensor

from psf.layers.ms_deform_attn import ms_deform_attn


class MSDeformAttnFunction:
    """Stands in for Deformable DETR's autograd function; not one itself."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """
        Args:
            value: (N, S, M, D), levels concatenated.
            value_spatial_shapes: (L, 2) int64, (H_l, W_l) of each level. On an accelerator reading
                it costs a synchronisation: call :func:`psf.layers.ms_deform_attn` with host numbers
                to save that.
            value_level_start_index: (L,) int64, ignored: levels follow each other without gaps.
            sampling_locations: (N, Q, M, L, P, 2), (x, y) with the level spanning [0, 1].
            attention_weights: (N, Q, M, L, P).
            im2col_step: ignored: any number of images goes at once.

        Returns:
            (N, Q, M * D).
        """
        del value_level_start_index, im2col_step
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)
