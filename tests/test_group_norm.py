"""GroupNorm with SiLU, in both memory formats, against torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.models.group_norm import GroupNorm, averaging_matrix

CASES = [(8, 32, 5, 3), (4, 4, 2, 2), (1, 6, 4, 7)]


def layer(groups: int, channels: int, *, silu: bool, dtype: torch.dtype) -> GroupNorm:
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels, eps=1e-5, silu=silu).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def expected(norm: GroupNorm, x: Tensor) -> Tensor:
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if norm.silu else y


def gradients(norm: GroupNorm, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("groups", "channels", "height", "width"), CASES)
def test_channels_last_is_torchs_group_norm(
    groups: int, channels: int, height: int, width: int, dtype: torch.dtype, *, silu: bool
) -> None:
    norm = layer(groups, channels, silu=silu, dtype=dtype)
    x = (3 + torch.randn(2, channels, height, width, dtype=dtype)).to(
        memory_format=torch.channels_last
    )
    x.requires_grad_()
    dy = torch.randn_like(x)
    y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, expected(norm, x), **tolerance)
    for found, wanted in zip(
        gradients(norm, x, y, dy), gradients(norm, x, expected(norm, x), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted, **tolerance)
    assert gradients(norm, x, norm(x), dy)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_mean_far_from_zero_costs_no_more_than_torchs() -> None:
    """The mean of squares less the square of the mean would have no right digit left."""
    norm = layer(2, 8, silu=False, dtype=torch.float32)
    x = (3000 + torch.randn(2, 8, 16, 16)).to(memory_format=torch.channels_last)
    exact = expected(norm.double(), x.double())
    norm.float()
    own, torchs = ((y - exact).abs().max() for y in (norm(x), expected(norm, x.contiguous())))
    assert own <= 1.5 * torchs


def test_contiguous_memory_has_torchs_bits() -> None:
    norm = layer(4, 8, silu=True, dtype=torch.float32)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(norm(x), expected(norm, x))


def test_bfloat16_is_as_exact_as_torchs() -> None:
    """Its statistics are in float32: the error against float64 is rounding of input and output."""
    norm = layer(8, 64, silu=True, dtype=torch.float32)
    x = (2 + torch.randn(4, 64, 8, 8)).bfloat16().to(memory_format=torch.channels_last)
    exact = expected(norm.double(), x.double())
    norm.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    own, torchs = (
        (z.double() - exact).square().mean().sqrt() for z in (y, expected(norm, x.contiguous()))
    )
    assert own <= 1.05 * torchs


def test_averaging_matrix_replaces_each_channel_by_its_groups_mean() -> None:
    v = torch.randn(3, 12)
    found = v @ averaging_matrix(12, 4, dtype=torch.float32)
    wanted = v.unflatten(1, (4, 3)).mean(2).repeat_interleave(3, dim=1)
    torch.testing.assert_close(found, wanted)
