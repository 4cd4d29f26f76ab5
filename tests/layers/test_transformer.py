import math

import pytest
import torch

from psf.layers.transformer import BoxHead, ClassHead, sine_position_encoding


def test_one_cell_by_hand():
    """One cell: the centre lies at half of the image, so the angle is pi and its divisions."""
    encoding = sine_position_encoding((1, 1), torch.tensor([(1, 1)]), 8)[0, 0, 0]
    angles = [math.pi, math.pi / 10000 ** (2 / 4)]
    half = [f(a) for a in angles for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoding, torch.tensor(half + half), atol=1e-5, rtol=0)


def test_valid_part_does_not_depend_on_padding():
    alone = sine_position_encoding((3, 5), torch.tensor([(3, 5)]), 16)
    padded = sine_position_encoding((8, 7), torch.tensor([(3, 5), (8, 7)]), 16)
    torch.testing.assert_close(padded[:1, :3, :5], alone)
    assert padded.isfinite().all()


def test_y_comes_first_then_x():
    encoding = sine_position_encoding((2, 3), torch.tensor([(2, 3)]), 8)[0]
    assert torch.equal(encoding[0, 0, 4:], encoding[1, 0, 4:])
    assert torch.equal(encoding[0, 0, :4], encoding[0, 2, :4])
    assert not torch.equal(encoding[0, 0, :4], encoding[1, 0, :4])


def test_channels_must_divide_by_four():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sine_position_encoding((1, 1), torch.tensor([(1, 1)]), 6)


def test_heads_start_as_they_should():
    """Classes at probability 0.01; boxes unchanged but for their size."""
    head = ClassHead(8, 3)
    torch.testing.assert_close(head.bias.sigmoid(), torch.full((3,), 0.01))
    change = BoxHead(8, size_bias=-2.0)(torch.randn(2, 5, 8))
    assert torch.equal(change, torch.tensor([0.0, 0.0, -2.0, -2.0]).expand(2, 5, 4))
