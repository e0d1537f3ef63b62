from collections import OrderedDict

import torch
from torch import nn

from pyops import vision

from .harness import refuses

MAPS = OrderedDict(a=torch.randn(2, 3, 12, 10), b=torch.randn(2, 5, 6, 5), c=torch.randn(2, 7, 3, 3))


def test_pyramid_equals_its_formula():
    fpn = vision.FeaturePyramidNetwork([3, 5, 7], 4, vision.LastLevelMaxPool())
    y = fpn(MAPS)
    assert list(y) == ["a", "b", "c", "pool"] and [tuple(v.shape[-2:]) for v in y.values()] == [
        (12, 10),
        (6, 5),
        (3, 3),
        (2, 2),
    ]
    p = fpn.state_dict()
    conv = lambda x, name, pad: nn.functional.conv2d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=pad)
    inner = conv(MAPS["c"], "inner_blocks.2", 0)
    torch.testing.assert_close(y["c"], conv(inner, "layer_blocks.2", 1))
    torch.testing.assert_close(y["pool"], y["c"][..., ::2, ::2])
    for level, name in ((1, "b"), (0, "a")):
        up = nn.functional.interpolate(inner, size=MAPS[name].shape[-2:], mode="nearest")
        inner = conv(MAPS[name], f"inner_blocks.{level}", 0) + up
        torch.testing.assert_close(y[name], conv(inner, f"layer_blocks.{level}", 1))
    assert all(not v.any() for k, v in p.items() if k.endswith("bias"))


def test_old_checkpoints_load():
    fpn = vision.FeaturePyramidNetwork([3, 5], 4)
    old = OrderedDict(
        (k.replace(".0.weight", ".weight").replace(".0.bias", ".bias"), v) for k, v in fpn.state_dict().items()
    )
    vision.FeaturePyramidNetwork([3, 5], 4).load_state_dict(old)


def test_p6_and_p7():
    fpn = vision.FeaturePyramidNetwork([3, 5, 7], 4, vision.LastLevelP6P7(7, 4), nn.BatchNorm2d)
    y = fpn(MAPS)
    assert list(y)[3:] == ["p6", "p7"] and y["p7"].shape == (2, 4, 1, 1)
    assert fpn.inner_blocks[0][0].bias is None and isinstance(fpn.inner_blocks[0][1], nn.BatchNorm2d)
    torch.testing.assert_close(y["p7"], fpn.extra_blocks.p7(y["p6"].relu()))


def test_frozen_batch_norm():
    trained = nn.BatchNorm2d(3, eps=0.01)
    for _ in range(2):
        trained(torch.randn(4, 3, 2, 2) * 3 + 1)
    with torch.no_grad():
        trained.weight.uniform_(), trained.bias.uniform_()
    frozen = vision.FrozenBatchNorm2d(3, eps=0.01)
    frozen.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(frozen(x), trained.eval()(x))
    assert not list(frozen.parameters()) and repr(frozen) == "FrozenBatchNorm2d(3, eps=0.01)"


def test_blocks():
    block = vision.Conv2dNormActivation(3, 8, 5, dilation=2)
    assert block[0].padding == (4, 4) and block[0].bias is None and block.out_channels == 8
    assert [type(m).__name__ for m in block] == ["Conv2d", "BatchNorm2d", "ReLU"]
    bare = vision.Conv2dNormActivation(3, 8, (3, 1), norm_layer=None, activation_layer=nn.GELU, inplace=None)
    assert bare[0].padding == (1, 0) and bare[0].bias is not None and len(bare) == 2
    assert vision.Conv3dNormActivation(1, 2)(torch.randn(2, 1, 3, 4, 5)).shape == (2, 2, 3, 4, 5)
    squeeze = vision.SqueezeExcitation(4, 2)
    x = torch.randn(2, 4, 3, 3)
    scale = squeeze.fc2(squeeze.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    torch.testing.assert_close(squeeze(x), scale * x)


def test_bad_input():
    refuses(ValueError, ("FeaturePyramidNetwork", "'in_channels_list'"), vision.FeaturePyramidNetwork, [0], 4)
    refuses(TypeError, ("FeaturePyramidNetwork", "'extra_blocks'"), vision.FeaturePyramidNetwork, [1], 4, nn.ReLU())
    refuses(RuntimeError, ("FeaturePyramidNetwork", "'x'"), vision.FeaturePyramidNetwork([3], 4), MAPS)
