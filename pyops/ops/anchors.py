"""Anchors: boxes of every size and ratio around every cell of every level of a feature pyramid.

    area = size²,  height / width = ratio;  centre of cell (i, j): (j stride_x, i stride_y)

Source: Ren et al. 2015, https://arxiv.org/abs/1506.01497; torchvision.models.detection.anchor_utils.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core import check

Numbers = Sequence[Sequence[float]]


class AnchorGenerator(torch.nn.Module):
    """Makes the anchors of a batch of images, as torchvision's generator of the same name does.

    Args:
        sizes: for every level the sizes in pixels of the image.
        aspect_ratios: for every level the ratios height / width; one tuple serves all levels.
    """

    def __init__(
        self,
        sizes: Numbers = ((128, 256, 512),),
        aspect_ratios: Numbers = ((0.5, 1.0, 2.0),),
    ) -> None:
        super().__init__()
        op = "AnchorGenerator"
        if not all(isinstance(s, (list, tuple)) for s in (*sizes, *aspect_ratios)):
            check.fail(TypeError, op, "sizes", sizes, "for every level a tuple of numbers")
        if len(aspect_ratios) == 1:
            aspect_ratios = list(aspect_ratios) * len(sizes)
        if len(sizes) != len(aspect_ratios):
            got = f"{len(sizes)} and {len(aspect_ratios)} levels"
            check.fail(ValueError, op, "aspect_ratios", got, "as many ratios as sizes")
        if not all(v > 0 for level in (*sizes, *aspect_ratios) for v in level):
            check.fail(ValueError, op, "sizes", sizes, "numbers > 0")
        self.sizes = tuple(tuple(s) for s in sizes)
        self.aspect_ratios = tuple(tuple(r) for r in aspect_ratios)
        self.cell_anchors = [self._cell(s, r) for s, r in zip(self.sizes, self.aspect_ratios)]

    @staticmethod
    def _cell(sizes: Sequence[float], ratios: Sequence[float]) -> torch.Tensor:
        """[len(ratios) * len(sizes), 4]: the anchors around the origin, rounded to whole pixels; ratios outside."""
        root = torch.tensor(ratios, dtype=torch.float32).sqrt()
        size = torch.tensor(sizes, dtype=torch.float32)
        width, height = ((f[:, None] * size).flatten() for f in (1 / root, root))
        return (torch.stack((-width, -height, width, height), 1) / 2).round()

    def num_anchors_per_location(self) -> list[int]:
        """Anchors of a cell, for every level."""
        return [len(s) * len(r) for s, r in zip(self.sizes, self.aspect_ratios)]

    def grid_anchors(
        self, grid_sizes: Sequence[tuple[int, int]], strides: Sequence[tuple[float, float]]
    ) -> list[torch.Tensor]:
        """For every level the anchors [H * W * A, 4]: rows, then columns, then the anchors of a cell.

        Args:
            grid_sizes: (H, W) of every level.
            strides: (rows, columns) in pixels of the image between neighbouring cells.
        """
        if not len(grid_sizes) == len(strides) == len(self.cell_anchors):
            got = f"{len(grid_sizes)} grids and {len(strides)} strides"
            check.fail(ValueError, "AnchorGenerator", "grid_sizes", got, f"{len(self.cell_anchors)} of each")
        found = []
        for (h, w), (dy, dx), cell in zip(grid_sizes, strides, self.cell_anchors):
            y = torch.arange(h, dtype=torch.int32, device=cell.device) * dy
            x = torch.arange(w, dtype=torch.int32, device=cell.device) * dx
            row, column = (t.flatten() for t in torch.meshgrid(y, x, indexing="ij"))
            shift = torch.stack((column, row, column, row), 1)[:, None]
            found.append((shift + cell.to(torch.promote_types(cell.dtype, shift.dtype))).reshape(-1, 4).to(cell.dtype))
        return found

    def forward(self, image_size: tuple[int, int], feature_maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For every level the anchors Tensor[H * W * A, 4] of one image, in the dtype and on the device of the maps.

        Args:
            image_size: (height, width) of the padded batch of images.
            feature_maps: Tensor[N, C, H, W] of every level.
        """
        like = feature_maps[0]
        self.cell_anchors = [cell.to(dtype=like.dtype, device=like.device) for cell in self.cell_anchors]
        grids = [(m.shape[-2], m.shape[-1]) for m in feature_maps]
        strides = [(float(image_size[0] // h), float(image_size[1] // w)) for h, w in grids]
        return self.grid_anchors(grids, strides)
