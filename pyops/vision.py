"""The functions and modules of torchvision.ops, on pyops kernels."""

from .ops.anchors import AnchorGenerator
from .ops.average_precision import average_precision
from .ops.boxes import (
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    complete_box_iou,
    complete_box_iou_loss,
    decode_boxes,
    distance_box_iou,
    distance_box_iou_loss,
    encode_boxes,
    generalized_box_iou,
    generalized_box_iou_loss,
    masks_to_boxes,
    remove_small_boxes,
)
from .ops.deform_conv import DeformConv2d, deform_conv2d
from .ops.drop_block import DropBlock2d, DropBlock3d, drop_block2d, drop_block3d
from .ops.feature_pyramid import (
    MLP,
    Conv2dNormActivation,
    Conv3dNormActivation,
    FeaturePyramidNetwork,
    FrozenBatchNorm2d,
    LastLevelMaxPool,
    LastLevelP6P7,
    Permute,
    SqueezeExcitation,
)
from .ops.focal_loss import sigmoid_focal_loss
from .ops.nms import batched_nms, filter_proposals, nms, nms_above, nms_padded, soft_nms
from .ops.roi_align import MultiScaleRoIAlign, PSRoIAlign, RoIAlign, ps_roi_align, roi_align
from .ops.roi_pool import PSRoIPool, RoIPool, ps_roi_pool, roi_pool
from .ops.stochastic_depth import StochasticDepth, stochastic_depth

__all__ = [
    "MLP",
    "AnchorGenerator",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "DeformConv2d",
    "DropBlock2d",
    "DropBlock3d",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MultiScaleRoIAlign",
    "PSRoIAlign",
    "PSRoIPool",
    "Permute",
    "RoIAlign",
    "RoIPool",
    "SqueezeExcitation",
    "StochasticDepth",
    "average_precision",
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "decode_boxes",
    "deform_conv2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "drop_block2d",
    "drop_block3d",
    "encode_boxes",
    "filter_proposals",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "masks_to_boxes",
    "nms",
    "nms_above",
    "nms_padded",
    "ps_roi_align",
    "ps_roi_pool",
    "remove_small_boxes",
    "roi_align",
    "roi_pool",
    "sigmoid_focal_loss",
    "soft_nms",
    "stochastic_depth",
]
