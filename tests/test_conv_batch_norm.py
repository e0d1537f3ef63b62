import copy
import importlib.util
import pickle
import re

import pytest
import torch
from torch import nn

import pyops
from pyops.demo import classification
from pyops.nn import BatchNorm2d, Conv2d, ConvBatchNorm, fuse_conv_bn

from .harness import refuses


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are not those of a new module."""
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for t, low, high in ((m.running_mean, -1, 1), (m.running_var, 0.5, 2), (m.weight, -1, 2), (m.bias, -1, 1)):
                if t is not None:
                    t.data = torch.rand(t.shape, generator=g, dtype=t.dtype) * (high - low) + low
    return model.double().eval()


class Block(nn.Module):
    """A residual block that torch.fx can trace; the last convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = Conv2d(6, 4, 3, padding=1, groups=2), BatchNorm2d(4, affine=False)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + x
        z = self.conv3(y)
        return self.bn3(z) + z


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.block(self.stem(x)) if x.sum() > -1e9 else x


@pytest.mark.parametrize(("make", "fused_pairs"), [(Block, 2), (Untraceable, 3)])
def test_one_convolution_in_eval_with_all_gradients(make, fused_pairs):
    model = with_statistics(make())
    fused = fuse_conv_bn(model)
    assert sum(isinstance(m, ConvBatchNorm) for m in fused.modules()) == fused_pairs
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y, z = model(x), fused(x)
    torch.testing.assert_close(z, y)
    grads = [torch.autograd.grad(v.sin().sum(), [x, *m.parameters()]) for v, m in ((y, model), (z, fused))]
    torch.testing.assert_close(grads[1][0], grads[0][0])
    theirs = dict(zip((name for name, _ in model.named_parameters()), grads[0][1:]))
    ours = dict(zip((name for name, _ in fused.named_parameters()), grads[1][1:]))
    assert len(ours) == len(theirs)
    for name, gradient in ours.items():
        before = re.sub(r"conv(\d)\.bn", r"bn\1", name).replace("stem.0.bn", "stem.1").replace(".conv.", ".")
        torch.testing.assert_close(gradient, theirs[before])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_convolution(n, transposed):
    conv = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")(4, 6, 3, stride=2, groups=2)
    model = with_statistics(nn.Sequential(conv, getattr(nn, f"BatchNorm{n}d")(6)))
    fused = fuse_conv_bn(model)
    assert isinstance(fused[0], ConvBatchNorm) and isinstance(fused[1], nn.Identity)
    x = torch.randn(2, 4, *(7, 6, 5)[:n], dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    with pyops.use() as report:
        torch.testing.assert_close(fused(x), model(x))
    assert any(op.startswith("conv") and entry.calls for op, entry in report.entries.items())


def test_training_goes_on_as_before():
    model = with_statistics(Block()).train()
    fused = fuse_conv_bn(model)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.conv1.bn.running_mean, model.bn1.running_mean)
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))


def test_what_stays_as_it_is():
    shared = nn.BatchNorm2d(4)
    model = with_statistics(
        nn.Sequential(
            nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), shared,
            nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False),
        )
    )  # fmt: skip
    fused = fuse_conv_bn(model)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    assert [type(m).__name__ for m in fused][:7] == [type(m).__name__ for m in model][:7]
    refuses(TypeError, ("fuse_conv_bn", "'model'", "Tensor"), fuse_conv_bn, x)


def test_half_weights_fold_in_float32():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    model[1].running_var.fill_(1e-3)
    model[0].bfloat16()
    weight, bias = fuse_conv_bn(model)[0].folded()
    assert weight.dtype == bias.dtype == torch.bfloat16
    exact = model[0].weight.double() / torch.sqrt(model[1].running_var.double() + 1e-5).view(-1, 1, 1, 1)
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=0)


class SamePadding(nn.Conv2d):
    """As TensorFlow pads, and the networks that came from there."""

    def forward(self, x):
        pad = self.weight.shape[-1] - 1
        x = nn.functional.pad(x, (0, pad, 0, pad))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


class PaddedByModule(nn.Conv2d):
    def __init__(self, *arguments, **more) -> None:
        super().__init__(*arguments, **more)
        self.before = nn.ReflectionPad2d(1)

    def forward(self, x):
        return super().forward(self.before(x) if self.kernel_size[0] > 1 else x)


class Halved(nn.Conv1d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input / 2, weight, bias)


class ByKeyword(nn.Conv3d):
    def forward(self, x):
        return nn.functional.conv3d(weight=self.weight, input=x.abs(), bias=self.bias, padding=1)


class ByTrainingMode(nn.Conv2d):
    def forward(self, x):
        y = self._conv_forward(x, self.weight, self.bias)
        return 2 * y if self.training else y


class PaddedBySize(nn.Conv2d):
    """Dynamic same padding."""

    def forward(self, x):
        pad = max(self.kernel_size[0] - x.shape[-1] % self.stride[0], 0)
        x = nn.functional.pad(x, (0, pad, 0, pad)) if pad > 0 else x
        return self._conv_forward(x, self.weight, self.bias)


class IgnoresBias(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


class AddsBiasTwice(nn.Conv2d):
    def forward(self, x):
        x = x if self.bias is None else x + self.bias.mean()
        return self._conv_forward(x, self.weight, self.bias)


class ReadsWeightTwice(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x * self.weight.abs().mean(), self.weight, self.bias)


class HasAnotherParameter(nn.Conv2d):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.full((), 3.0))

    def forward(self, x):
        return self._conv_forward(x * self.gain, self.weight, self.bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias).relu()


class ByClass(nn.Conv2d):
    """Tracing does not see what a tensor would do."""

    def forward(self, x):
        x = 2 * x if isinstance(x, torch.Tensor) else x
        return self._conv_forward(x, self.weight, self.bias)


class NotTwoDimensional(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv1d(x.flatten(-2), self.weight[:, :, 0], self.bias).unsqueeze(-1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Scaled(Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 3 * super()._conv_forward(input, weight, bias)


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Named(nn.Conv2d):
    """Computes what its base does."""


def hooked(module: nn.Module, before: bool = False) -> nn.Module:
    if before:
        module.register_forward_pre_hook(lambda module, inputs: tuple(2 * t for t in inputs))
    else:
        module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def patched(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: forward(x).abs()
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Standardised(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (PaddedBySize(4, 6, 3, stride=2), nn.BatchNorm2d(6)),
        lambda: (IgnoresBias(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (AddsBiasTwice(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (ReadsWeightTwice(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (HasAnotherParameter(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (Activated(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (ByClass(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (NotTwoDimensional(4, 6, 3), nn.BatchNorm2d(6)),
        lambda: (hooked(SamePadding(4, 6, 2)), nn.BatchNorm2d(6)),
        lambda: (patched(SamePadding(4, 6, 2)), nn.BatchNorm2d(6)),
        lambda: (Scaled(4, 6, 3), BatchNorm2d(6)),
        lambda: (nn.Conv2d(4, 6, 3), Rectified(6)),
        lambda: (hooked(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        lambda: (hooked(nn.Conv2d(4, 6, 3), before=True), nn.BatchNorm2d(6)),
        lambda: (nn.Conv2d(4, 6, 3), hooked(nn.BatchNorm2d(6))),
        lambda: (patched(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
    ],
)
def test_what_computes_something_else_stays_as_it_is(make):
    model = with_statistics(nn.Sequential(*make()))
    fused = fuse_conv_bn(model)
    assert [type(m) for m in fused] == [type(m) for m in model]
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(ConvBatchNorm(*model).eval()(x), model(x))  # not folded here either


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamePadding(4, 6, 2, stride=2),
        lambda: SamePadding(4, 6, 2, bias=False),
        lambda: PaddedByModule(4, 6, 3, groups=2),
        lambda: Halved(4, 6, 3, bias=False),
        lambda: ByKeyword(4, 6, 3, bias=False),
        lambda: ByTrainingMode(4, 6, 3, padding="same", padding_mode="circular"),
    ],
)
def test_a_forward_whose_graph_is_one_convolution_folds(make):
    """With all gradients; where the convolution trains beside a frozen norm, as before."""
    conv = make()
    n = conv.weight.dim() - 2
    model = with_statistics(nn.Sequential(conv, getattr(nn, f"BatchNorm{n}d")(6)))
    random = torch.get_rng_state()
    fused = fuse_conv_bn(model)
    assert torch.equal(random, torch.get_rng_state())
    assert isinstance(fused[0], ConvBatchNorm) and isinstance(fused[1], nn.Identity)
    assert {name.removeprefix("0.conv.").removeprefix("0.bn.") for name in fused.state_dict()} == {
        name[2:] for name in model.state_dict()
    }
    for copied in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for size in (5, 8):
            x = torch.randn(2, 4, *[size] * n, dtype=torch.float64, requires_grad=True)
            y, z = model(x), copied(x)
            torch.testing.assert_close(z, y)
            theirs, ours = (
                torch.autograd.grad(v.sin().sum(), [x, *m.parameters()]) for v, m in ((y, model), (z, copied))
            )
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():  # read where they are, not copied
        fused[0].conv.weight.mul_(2), model[0].weight.mul_(2)
    torch.testing.assert_close(fused(x), model(x))
    model[0].train(), fused[0].conv.train()
    torch.testing.assert_close(fused(x), model(x))


def test_to_fuse_twice_changes_nothing():
    for training in (False, True):
        model = with_statistics(Block()).train(training)
        once = fuse_conv_bn(model)
        twice = fuse_conv_bn(once)
        assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(twice(x), model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_that_a_hook_computes_stays_and_a_parametrised_one_folds():
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    for norm, pairs in ((nn.utils.weight_norm, 0), (nn.utils.parametrizations.weight_norm, 1)):
        model = with_statistics(nn.Sequential(norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)))
        with torch.no_grad():
            model(x)  # nn.utils.weight_norm: its weight in float64
        fused = fuse_conv_bn(model)
        assert sum(isinstance(m, ConvBatchNorm) for m in fused.modules()) == pairs
        for m in (model, fused):
            for name, p in m.named_parameters():
                if name.endswith(("weight_g", "original0")):
                    p.data = p.data * 3
        torch.testing.assert_close(fused(x), model(x))


def test_a_subclass_that_changes_nothing_folds():
    model = with_statistics(nn.Sequential(Named(4, 6, 3), nn.BatchNorm2d(6)))
    fused = fuse_conv_bn(model)
    assert isinstance(fused[0], ConvBatchNorm)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs the network")
def test_every_pair_of_efficientnet_folds_though_it_pads_in_its_own_forward():
    model = classification.load_model()
    fused = fuse_conv_bn(model)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, ConvBatchNorm) and m.folds for m in fused.modules()) == norms == 49
    photos = [classification.load_photo(package, file) for _, package, file in classification.PHOTOS]
    x = torch.stack([classification.preprocess(photo) for photo in photos])
    with torch.no_grad():
        logits, by_torch = model(x), fused(x)
        with pyops.use() as report:
            by_pyops = fused(x)
    assert "batch_norm" not in report.entries and not any(entry.kept for entry in report.entries.values())
    for found in (by_torch, by_pyops):
        assert (found - logits).abs().max() < 1e-4  # 8e-6 was seen, of logits up to 11
        assert torch.equal(found.topk(3).indices, logits.topk(3).indices)
