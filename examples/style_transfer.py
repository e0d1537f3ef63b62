"""A small network learns to repaint one photo in the manner of another.

    python examples/style_transfer.py

A network of convolutions and instance norms (Johnson et al. 2016, https://arxiv.org/abs/1603.08155; Ulyanov et al.
2016, https://arxiv.org/abs/1607.08022) paints; a pretrained EfficientNet-Lite0, unmodified, run by pyops.use, judges.
With F_l the features of the judge after layer l, N_l of them in a channel and G_l = F_l F_lᵀ / N_l their Gram matrix,
the painter x minimises

    content  mean (F_c(x) - F_c(photo))²            of one deep layer
    style    Σ_l ‖G_l(x) - G_l(style)‖² / ‖G_l(style)‖²
    rough    mean |x[i, j] - x[i, j+1]| + mean |x[i, j] - x[i+1, j]|

(Gatys et al. 2015, https://arxiv.org/abs/1508.06576). The photos ship with scikit-image.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import pyops
from pyops import functional as F
from pyops import nn, optim
from pyops.demo.classification import load_model
from pyops.demo.packages import load_photo

PHOTO, STYLE = "chelsea.png", "ihc.png"
SIDE = 192
STYLE_LAYERS = (0, 2, 4, 8)  # blocks of the judge, with 16, 24, 40 and 80 channels
CONTENT_LAYER = 4
CONTENT_WEIGHT, STYLE_WEIGHT, ROUGH_WEIGHT = 0.006, 1.0, 0.02


# The painter


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, padding_mode="reflect", bias=False)


class Residual(torch.nn.Module):
    """x + norm(conv(relu(norm(conv(x)))))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(conv(channels, channels, 3) for _ in range(2))
        self.norms = torch.nn.ModuleList(nn.InstanceNorm2d(channels, affine=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.convs[0](x)))
        return x + self.norms[1](self.convs[1](y))


class Painter(torch.nn.Module):
    """An image [B, 3, H, W] around 0 to another of the same size; H and W are multiples of 4.

    Two strided convolutions down, residual blocks, twice nearest-neighbour and convolution up, tanh.
    """

    def __init__(self, width: int = 16, residuals: int = 3) -> None:
        super().__init__()
        plan = [(3, width, 7, 1), (width, 2 * width, 3, 2), (2 * width, 4 * width, 3, 2)]
        self.down = torch.nn.ModuleList(conv(*layer) for layer in plan)
        self.residuals = torch.nn.Sequential(*(Residual(4 * width) for _ in range(residuals)))
        self.up = torch.nn.ModuleList([conv(4 * width, 2 * width, 3), conv(2 * width, width, 3)])
        norm_widths = (width, 2 * width, 4 * width, 2 * width, width)
        self.norms = torch.nn.ModuleList(nn.InstanceNorm2d(channels, affine=True) for channels in norm_widths)
        self.last = conv(width, 3, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.down, self.norms):
            x = F.relu(norm(layer(x)))
        x = self.residuals(x)
        for layer, norm in zip(self.up, self.norms[len(self.down) :]):
            x = F.relu(norm(layer(F.interpolate(x, scale_factor=2))))
        return F.tanh(self.last(x))


# The judge


class Judge(torch.nn.Module):
    """Features of EfficientNet-Lite0 after some of its blocks; its weights never change."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = load_model().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """[B, 3, H, W] around 0 -> {block: [B, C, h, w]}"""
        found = {}
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        for index, block in enumerate(self.network._blocks[: max(STYLE_LAYERS) + 1]):
            x = block(x)
            if index in STYLE_LAYERS or index == CONTENT_LAYER:
                found[index] = x
        return found


def gram(features: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, C]"""
    rows = features.flatten(2)
    return F.gram_matrix(rows, 1 / rows.shape[2])


def load_image(file: str, side: int) -> torch.Tensor:
    """The middle square of a photo, [1, 3, side, side] in [-1, 1]."""
    import numpy as np

    photo = load_photo("skimage", f"data/{file}")
    edge = min(photo.size)
    left, top = ((extent - edge) // 2 for extent in photo.size)
    square = photo.resize((side, side), box=(left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float()[None] / 127.5 - 1


def save_image(path: Path, images: list[torch.Tensor]) -> None:
    """Images [1, 3, H, W] in [-1, 1] beside each other."""
    from PIL import Image

    row = torch.cat(images, 3)[0].clamp(-1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((row + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


class Loss:
    """The three terms of the docstring above, for one photo and one style."""

    def __init__(self, judge: Judge, photo: torch.Tensor, style: torch.Tensor) -> None:
        self.judge = judge
        with torch.no_grad():
            self.content = judge(photo)[CONTENT_LAYER]
            self.grams = {layer: gram(features) for layer, features in judge(style).items() if layer in STYLE_LAYERS}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        features = self.judge(x)
        content = F.mse_loss(features[CONTENT_LAYER], self.content)
        style = sum(
            F.mse_loss(gram(features[layer]), wanted, reduction="sum") / wanted.square().sum()
            for layer, wanted in self.grams.items()
        )
        rough = F.l1_loss(x[..., 1:], x[..., :-1]) + F.l1_loss(x[..., 1:, :], x[..., :-1, :])
        return CONTENT_WEIGHT * content + STYLE_WEIGHT * style + ROUGH_WEIGHT * rough


def paint(steps: int, side: int = SIDE, seed: int = 0, report: Any = None) -> tuple[Painter, list[float]]:
    """Trains a painter; it and the loss of every step."""
    torch.manual_seed(seed)
    photo, style = load_image(PHOTO, side), load_image(STYLE, side)
    painter = Painter()
    optimizer = optim.Adam(painter.parameters(), lr=3e-3)
    losses = []
    with pyops.use():
        loss_of = Loss(Judge(), photo, style)
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(painter(photo))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if report is not None:
                report(step, losses)
    return painter, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels, a multiple of 4")
    parser.add_argument("--out", type=Path, default=Path("out/style_transfer.png"))
    options = parser.parse_args()
    begin = time.perf_counter()

    def report(step: int, losses: list[float]) -> None:
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:8.4f}  {time.perf_counter() - begin:5.0f} s", flush=True)

    painter, losses = paint(options.steps, options.side, report=report)
    photo, style = load_image(PHOTO, options.side), load_image(STYLE, options.side)
    with torch.no_grad():
        save_image(options.out, [photo, style, painter(photo)])
    print(f"the loss fell by {1 - losses[-1] / losses[0]:.0%}; picture: {options.out}")


if __name__ == "__main__":
    main()
