"""torchvision without its compiled library: its Python files, with the ops of pyops.

    from pyops.compat import torchvision
    torchvision.install()
    import torchvision.models.detection

On a machine where torchvision's own library does not load (a CPU-only torch with the package index's wheel), importing
torchvision fails, or its ops are missing. ``install`` declares the ops in torch's registry under the names torchvision
uses and implements ``nms``, ``roi_align``, ``roi_pool``, ``ps_roi_align``, ``ps_roi_pool`` and ``deform_conv2d`` on
pyops: differentiable to every order, on every device pyops serves. ``torchvision.ops.batched_nms`` groups boxes by
class with pyops instead of moving the classes apart, which rounds large coordinates.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from .. import vision
from ..ops import roi_pool as roi_pool_room

_POOL = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"roi_align({_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    "ps_roi_align": f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    "deform_conv2d": "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups, "
    "int offset_groups, bool use_mask) -> Tensor",
}
_library: torch.library.Library | None = None


def _roi_align(input, rois, spatial_scale, p, q, sampling_ratio, aligned):
    return vision.roi_align(input, rois, (p, q), spatial_scale, max(sampling_ratio, -1), aligned)


def _roi_pool(input, rois, spatial_scale, p, q):
    pixels = roi_pool_room._pixels("roi_pool", input, rois, spatial_scale)
    y = vision.roi_pool(input, rois, (p, q), spatial_scale)
    # torchvision hands out where each maximum is; nothing but its own gradient reads it
    with torch.no_grad():
        argmax = roi_pool_room.maxima(input, pixels, p, q)
    return y, argmax


def _channels(y: torch.Tensor) -> torch.Tensor:
    """Which plane each position-sensitive output reads, int32, as torchvision hands it out."""
    r, c, p, q = y.shape
    return torch.arange(c * p * q, dtype=torch.int32, device=y.device).reshape(c, p, q).repeat(r, 1, 1, 1)


def _ps_roi_align(input, rois, spatial_scale, p, q, sampling_ratio):
    y = vision.ps_roi_align(input, rois, (p, q), spatial_scale, max(sampling_ratio, -1))
    return y, _channels(y)


def _ps_roi_pool(input, rois, spatial_scale, p, q):
    y = vision.ps_roi_pool(input, rois, (p, q), spatial_scale)
    return y, _channels(y)


def _deform_conv2d(input, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask):
    return vision.deform_conv2d(
        input, offset, weight, bias, stride=(sh, sw), padding=(ph, pw), dilation=(dh, dw),
        mask=mask if use_mask else None,
    )  # fmt: skip


def _grouped(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A way of torchvision to suppress within classes, by pyops; what is traced or scripted stays torchvision's."""

    @functools.wraps(theirs)  # which keeps the marks by which torch.jit.script finds the original
    def batched_nms(
        boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
    ) -> torch.Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return theirs(boxes, scores, idxs, iou_threshold)
        return vision.batched_nms(boxes, scores, idxs, iou_threshold)

    return batched_nms


def _quantised(*args: Any) -> Any:
    raise NotImplementedError("torchvision::qnms: pyops has no quantised ops")


def works() -> bool:
    """Does torchvision's own compiled library work here (or has ``install`` run)?"""
    try:
        torchvision = importlib.import_module("torchvision")
    except RuntimeError:
        return False
    return bool(torchvision.extension._has_ops())


def install() -> bool:
    """Makes ``import torchvision`` work with pyops in the place of its compiled ops.

    Call it before torchvision is imported (a failed import before is no harm). Where torchvision's own library loads,
    nothing is changed. Calling it again is no harm.

    Returns:
        True where pyops serves torchvision's ops, False where torchvision's own library does.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    global _library
    if _library is not None:
        return True
    if works():
        return False
    _forget_failed_import()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    for key in ("CPU", "CUDA"):
        # torchvision registers a fake for these two, which a composite op may not have
        library.impl("nms", vision.nms, key)
        library.impl("qnms", _quantised, key)
    for name, function in (
        ("roi_align", _roi_align),
        ("roi_pool", _roi_pool),
        ("ps_roi_align", _ps_roi_align),
        ("ps_roi_pool", _ps_roi_pool),
        ("deform_conv2d", _deform_conv2d),
    ):
        library.impl(name, function, "CompositeImplicitAutograd")
    _library = library
    torchvision = importlib.import_module("torchvision")
    torchvision.extension._has_ops = _yes
    boxes = torchvision.ops.boxes
    for way in ("_batched_nms_coordinate_trick", "_batched_nms_vanilla"):
        setattr(boxes, way, _grouped(getattr(boxes, way)))
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.") and hasattr(module, "_has_ops"):
            module._has_ops = _yes  # type: ignore[attr-defined]
    return True


def _yes() -> bool:
    return True


def _forget_failed_import() -> None:
    """A failed import leaves submodules behind that have not seen the ops."""
    if "torchvision" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
