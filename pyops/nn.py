"""The modules of torch.nn, on pyops kernels; parameters, initialisation and state_dict are torch's."""

from .ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .ops.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .ops.im2col import Fold, Unfold
from .ops.layer_norm import LayerNorm
from .ops.rms_norm import RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Fold",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Unfold",
]
