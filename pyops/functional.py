"""The functions of torch.nn.functional, on pyops kernels."""

from .ops.batch_norm import batch_norm
from .ops.group_norm import group_norm, instance_norm
from .ops.im2col import fold, unfold
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm

__all__ = ["batch_norm", "fold", "group_norm", "instance_norm", "layer_norm", "rms_norm", "unfold"]
