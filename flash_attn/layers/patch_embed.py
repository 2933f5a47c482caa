"""An image as a sequence of patches (arXiv:2010.11929)."""

from __future__ import annotations

from typing import Any, Optional, Union

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Patches of an image, each projected to embed_dim.

    Args:
        img_size, patch_size: height and width, or one number for both.
        norm_layer: makes a norm of embed_dim, behind the projection.
        flatten: the result is (b, patches, embed_dim), else (b, rows, columns, embed_dim).
        fused_bias_fc: a hint; results don't depend on it.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: Union[int, tuple[int, int]] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Any = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        for size, patch in zip(self.img_size, self.patch_size):
            if size % patch != 0:
                raise ValueError(
                    f"PatchEmbed: patch_size must divide img_size; got {patch_size}, {img_size}"
                )
        self.grid_size = tuple(x // y for x, y in zip(self.img_size, self.patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        height, width = self.patch_size
        self.proj = nn.Linear(in_chans * height * width, embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, in_chans, height, width) of img_size."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"PatchEmbed: x must have height and width {self.img_size}; got {tuple(x.shape)}"
            )
        b, channels = x.shape[:2]
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        patches = x.reshape(b, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        y = self.proj(patches.flatten(-3))
        return self.norm(y.flatten(1, 2) if self.flatten else y)  # type: ignore[no-any-return]


def _pair(x: Optional[Union[int, tuple[int, int]]]) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)  # type: ignore[return-value,arg-type]
