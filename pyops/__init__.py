"""pyops: hand-written CUDA C++, Triton and C++ kernels that drop in for the torch ops.

from pyops import functional as F      # torch.nn.functional's signatures
with pyops.use(): model(x)             # a model nobody edits
with pyops.backend("triton"): ...      # force one implementation
"""

from . import functional, nn, optim, vision
from .core.backend import backend
from .core.intercept import use
from .core.library import release_workspace
from .core.tuning import tuning

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "functional", "nn", "optim", "release_workspace", "tuning", "use", "vision"]
