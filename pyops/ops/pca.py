"""Principal components and whitening, on torch.linalg.

    x = mean + u s vᵀ       u: [N, Q], s: [Q], vᵀ: [Q, D], Q = min(N, D), by singular values
    scores    z = (x - mean) v
    variances s² / (N - 1)
    whitened  z / √variances: columns of variance 1, uncorrelated

Sources: Jolliffe 2002, "Principal Component Analysis"; sklearn.decomposition.PCA (signs of components as there: the
entry of largest magnitude of each component is positive).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core import check
from ..core.autograd import derivative_levels_active
from ..core.explain import composite


class PCA(NamedTuple):
    """Principal components of rows; leading dimensions are batches.

    Attributes:
        mean: Tensor[*, D].
        components: Tensor[*, K, D], orthonormal rows, by falling variance.
        variances: Tensor[*, K].
    """

    mean: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor


def pca(input: torch.Tensor, components: int | None = None) -> PCA:
    """Principal components of the rows of ``input``.

    Args:
        input: Tensor[*, N, D] in float32, float64, bfloat16 or float16, N >= 2.
        components: how many to keep, 1 to min(N, D); all if None.

    Returns:
        ``PCA(mean, components, variances)`` in the input's dtype; those of half precision are computed in float32.

    Raises:
        RuntimeError: an input of fewer than two dimensions or rows.
        torch.linalg.LinAlgError: NaN or infinity in the input, on the CPU.
        ValueError: ``components`` out of range.

    Differentiable where the singular values differ, as torch.linalg.svd is. Runs on torch's own ops on every device.
    """
    check.floating("pca", "input", input)
    if input.dim() < 2 or input.shape[-2] < 2 or input.shape[-1] < 1:
        check.fail(RuntimeError, "pca", "input", f"shape {list(input.shape)}", "[*, N, D] with N >= 2, D >= 1")
    rows, columns = input.shape[-2:]
    most = min(rows, columns)
    count = most if components is None else components
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        check.fail(ValueError, "pca", "components", components, f"an int in [1, {most}] or None")
    wide = input.to(check.accumulate_dtype(input.dtype))
    mean = wide.mean(-2)
    centred = wide - mean.unsqueeze(-2)
    if rows > columns and not (derivative_levels_active() or (torch.is_grad_enabled() and input.requires_grad)):
        # u is nobody's: x = q r has the s and v of r. This form of QR has no gradient.
        centred = torch.linalg.qr(centred, mode="r").R
    try:
        _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    except torch.linalg.LinAlgError:
        if input.isfinite().all():
            raise
        check.fail(torch.linalg.LinAlgError, "pca", "input", "numbers that are not finite", "finite ones")
    vectors = vectors[..., :count, :]
    largest = vectors.detach().abs().argmax(-1, keepdim=True)
    sign = torch.where(vectors.detach().gather(-1, largest) < 0, -1.0, 1.0).to(vectors.dtype)
    found = mean, vectors * sign, values[..., :count].square() / (rows - 1)
    return PCA(*(t.to(input.dtype) for t in found))


def pca_transform(input: torch.Tensor, model: PCA, whiten: bool = False) -> torch.Tensor:
    """Scores of rows in the components of ``model``; whitened, each of variance 1 over the rows it was made from.

    Args:
        input: Tensor[*, N, D].
        model: what ``pca`` returned.
        whiten: divide by the standard deviation of each component.

    Returns:
        Tensor[*, N, K]. A component without variance is not divided.

    Raises:
        RuntimeError: rows of another length than the components, or of another dtype.
    """
    _checked("pca_transform", "input", input, model)
    if input.dim() < 2 or input.shape[-1] != model.mean.shape[-1]:
        wanted = f"[*, N, {model.mean.shape[-1]}]"
        check.fail(RuntimeError, "pca_transform", "input", f"shape {list(input.shape)}", wanted)
    scores = (input - model.mean.unsqueeze(-2)) @ model.components.mT
    return scores / _deviations(model) if whiten else scores


def pca_inverse(scores: torch.Tensor, model: PCA, whiten: bool = False) -> torch.Tensor:
    """Rows from their scores: the inverse of ``pca_transform`` where all components are kept, else the nearest rows.

    Args:
        scores: Tensor[*, N, K].
        model: what ``pca`` returned.
        whiten: whether the scores are whitened.

    Returns:
        Tensor[*, N, D].

    Raises:
        RuntimeError: another number of scores than of components, or another dtype.
    """
    _checked("pca_inverse", "scores", scores, model)
    if scores.dim() < 2 or scores.shape[-1] != model.components.shape[-2]:
        wanted = f"[*, N, {model.components.shape[-2]}]"
        check.fail(RuntimeError, "pca_inverse", "scores", f"shape {list(scores.shape)}", wanted)
    plain = scores * _deviations(model) if whiten else scores
    return plain @ model.components + model.mean.unsqueeze(-2)


def _checked(op: str, name: str, x: torch.Tensor, model: PCA) -> None:
    check.floating(op, name, x)
    if not isinstance(model, PCA):
        check.fail(TypeError, op, "model", type(model).__name__, "what pca returned")
    if x.dtype != model.mean.dtype:
        check.fail(RuntimeError, op, name, x.dtype, f"{model.mean.dtype}, as the model")


def _deviations(model: PCA) -> torch.Tensor:
    """[*, 1, K]; 1 where rounding is all there is."""
    deviations = model.variances.sqrt()
    least = deviations.amax(-1, keepdim=True) * torch.finfo(deviations.dtype).eps * model.mean.shape[-1]
    return torch.where(deviations > least, deviations, 1.0).unsqueeze(-2)


composite("pca", "pca_transform", "pca_inverse")
