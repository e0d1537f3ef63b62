"""Convolutional networks on real digits: pyops follows torch step by step, and learns as well."""

import copy

import pytest
import torch
from torch import nn

import pyops

from .harness import digits


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside one of 1 x 1 where the size changes (He et al. 2015)."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = channels == outputs and stride == 1
        self.beside = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(self.main(x) + self.beside(x))


class Inverted(nn.Module):
    """1 x 1 to more channels, depthwise 3 x 3, 1 x 1 to fewer (Sandler et al. 2018)."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.residual = channels == outputs and stride == 1
        self.main = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        return self.main(x) + x if self.residual else self.main(x)


def network(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        block(16, 16, 1), block(16, 32, 2), block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def split():
    """1437 digits [N, 1, 8, 8] in [-1, 1] to train on, 360 to be judged by."""
    pixels, y = digits()
    x = (2 * pixels - 1).float().view(-1, 1, 8, 8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    x, y = x[order], y[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def train(model, x, y, steps, rate, planned=150, batch=64):
    """Losses of the first steps of a planned number: SGD with momentum, its rate falls to nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    g = torch.Generator().manual_seed(2)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / planned)
        index = torch.randint(len(y), (batch,), generator=g)
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "rate", "tolerance"),
    # where rounding decides on which side of a relu a number falls, the losses part by as much as a step is long
    [(torch.float64, 0.05, 1e-9), (torch.float32, 0.002, 1e-4)],
)
@pytest.mark.parametrize("block", [Residual, Inverted])
@pytest.mark.parametrize("channels_last", [False, True])
def test_losses_follow_torch(block, channels_last, dtype, rate, tolerance):
    (x, y), _ = split()
    model, x = network(block).to(dtype), x.to(dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    theirs = train(copy.deepcopy(model), x, y, 12, rate)
    with pyops.use() as report:
        ours = train(model, x, y, 12, rate)
    for op in ("conv2d", "batch_norm", "relu" if block is Residual else "hardtanh", "cross_entropy", "linear"):
        assert report.entries[op].calls and not report.entries[op].kept, op
    assert ours == pytest.approx(theirs, rel=0, abs=tolerance)
    assert len(set(ours)) == 12 and ours[-1] < ours[0]


@pytest.mark.slow
@pytest.mark.parametrize("block", [Residual, Inverted])
def test_digits_are_learned(block):
    (x, y), (test_x, test_y) = split()
    model = network(block)
    with pyops.use():
        train(model, x, y, 150, rate=0.1)
        with torch.no_grad():
            answers = model.eval()(test_x).argmax(1)
    assert (answers == test_y).float().mean() >= 0.97
