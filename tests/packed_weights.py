"""``Nvfp4Tensor`` of every kind, filled at random, and comparisons of their parts."""

import torch
from torch import Tensor, nn

from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle

# name -> leading shape, shape of the global scale
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "matrix": ((8,), ()),
    "segments": ((8,), (2,)),
    "experts": ((3, 8), (3,)),
    "experts, one scale": ((3, 8), ()),
    "experts with segments": ((3, 8), (3, 2)),
}


def packed(kind: str, dtype: torch.dtype = torch.bfloat16, k: int = 32) -> Nvfp4Tensor:
    """Any codes and finite block scales; global scales that are no powers of two."""
    lead, scale_shape = KINDS[kind]
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-4, dtype=dtype)


def parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(weight, Nvfp4Tensor)
    return weight.codes, weight.block_scales, weight.global_scale


def snapshot(weight: Tensor) -> list[Tensor]:
    return [part.clone() for part in parts(weight)]


def assert_same_weight(actual: Tensor, expected: Tensor) -> None:
    """Packed, the same dtype and shape, and every part bitwise the same."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    for left, right in zip(parts(actual), parts(expected), strict=True):
        oracle.assert_same_bits(left, right)


def assert_unchanged(weight: Tensor, before: list[Tensor]) -> None:
    for left, right in zip(parts(weight), before, strict=True):
        oracle.assert_same_bits(left, right)


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
