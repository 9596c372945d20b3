"""What kernel-builder runs on a GPU; the whole suite is in the rope_mm repository."""

import math

import pytest
import rope_mm_kernels
import torch


@pytest.mark.kernels_ci
def test_a_quarter_turn_swaps_the_channels_of_a_pair_and_its_gradient_turns_back():
    """(x1, x2) goes to (-x2, x1), and a gradient of (1, 1) to (1, -1)."""
    q = torch.randn(1, 3, 2, 8, device="cuda", requires_grad=True)
    positions, omega = torch.ones(3, 1, device="cuda"), torch.full((1, 4), math.pi / 2, device="cuda")
    y, _ = rope_mm_kernels.rotate(q, q[:, :, :0], positions, omega)
    torch.testing.assert_close(y, torch.cat((-q[..., 4:], q[..., :4]), -1), atol=2e-6, rtol=0)
    (grad,) = torch.autograd.grad(y.sum(), q)
    ones = torch.ones_like(q[..., :4])
    torch.testing.assert_close(grad, torch.cat((ones, -ones), -1), atol=2e-6, rtol=0)
