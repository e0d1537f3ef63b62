"""examples/style_transfer.py: its loss is the formula of its docstring, and falls."""

import pytest
import torch

import pyops

from . import harness


@pytest.fixture(scope="module")
def example():
    with harness.example("style_transfer") as module:
        yield module


def test_loss_and_its_gradient_are_those_of_plain_torch(example):
    judge = example.Judge()
    photo, style = example.load_image(example.PHOTO, 32), example.load_image(example.STYLE, 32)
    x = (photo + 0.1 * torch.randn_like(photo)).requires_grad_()
    with pyops.use() as report:
        loss = example.Loss(judge, photo, style)(x)
        (gradient,) = torch.autograd.grad(loss, x)
    assert sum(report.entries["conv2d"].backends.values()) > 0

    wanted, painted, content = judge(style), judge(x), judge(photo)[example.CONTENT_LAYER]
    expected = example.CONTENT_WEIGHT * (painted[example.CONTENT_LAYER] - content).square().mean()
    for layer in example.STYLE_LAYERS:
        g, to = (torch.einsum("bchw,bdhw->bcd", f[layer], f[layer]) / f[layer][0, 0].numel() for f in (painted, wanted))
        expected = expected + example.STYLE_WEIGHT * (g - to).square().sum() / to.square().sum()
    rough = x.diff(dim=3).abs().mean() + x.diff(dim=2).abs().mean()
    expected = expected + example.ROUGH_WEIGHT * rough
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    (reference,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def test_it_paints(example, tmp_path):
    painter, losses = example.paint(steps=4, side=48)
    assert losses[-1] < losses[0]
    photo = example.load_image(example.PHOTO, 48)
    with torch.no_grad():
        example.save_image(tmp_path / "a" / "picture.png", [photo, painter(photo)])
    from PIL import Image

    assert Image.open(tmp_path / "a" / "picture.png").size == (96, 48)


@pytest.mark.slow
def test_loss_falls_by_nine_tenths(example):
    losses = example.paint(steps=300, side=96)[1]
    assert losses[-1] <= 0.1 * losses[0]
