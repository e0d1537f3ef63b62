"""Distances between rows: all pairs, matching pairs, the nearest; cosine similarity; the Gram matrix.

    cdist              y[p,r] = (Σ_m |x1[p,m] - x2[r,m]|^p)^(1/p)
    pairwise_distance  y[n]   = (Σ_m |x1[n,m] - x2[n,m] + ε|^p)^(1/p)
    cosine_similarity  y[n]   = x1[n]·x2[n] / (max(‖x1[n]‖, ε) max(‖x2[n]‖, ε))
    knn                the k smallest of each row of cdist, with their indices, without that matrix
    gram_matrix        G[c,d] = Σ_n x[c,n] x[d,n]

Differences are taken first and summed then, not ‖a‖² + ‖b‖² - 2ab, which cancels: the distance of equals is exactly 0.
Its gradient there is 0. Sources: torch.cdist, torch.nn.functional.pairwise_distance, cosine_similarity; Gatys, Ecker,
Bethge 2016 (Gram matrices). Gradients: docs/math/distances.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import composite
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked


def _fwd_fake(x1, x2, p):
    return x1.new_empty(x1.shape[0], x1.shape[1], x2.shape[1])


def _bwd_fake(dy, x1, x2, dist, p, need_dx1, need_dx2):
    return (
        torch.empty_like(x1) if need_dx1 else x1.new_empty(0),
        torch.empty_like(x2) if need_dx2 else x2.new_empty(0),
    )


def _knn_fake(query, data, k, p):
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


_kernels = library.triton_kernels("distance")
_fwd = library.declare("cdist_fwd(Tensor x1, Tensor x2, float p) -> Tensor", _fwd_fake, _kernels)
_bwd = library.declare(
    "cdist_bwd(Tensor dy, Tensor x1, Tensor x2, Tensor dist, float p, bool need_dx1, bool need_dx2)"
    " -> (Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)
_search = library.declare(
    "knn_search(Tensor query, Tensor data, int k, float p) -> (Tensor, Tensor)", _knn_fake, _kernels
)


def _length(d: torch.Tensor, p: float, keepdim: bool = False) -> torch.Tensor:
    """(Σ |d|^p)^(1/p) over the last dimension, differentiable, with gradient 0 where it is 0."""
    size = d.abs()
    if p == 0:
        counted = torch.where(d == d, (d != 0).to(d.dtype), d.detach())  # a NaN stays one
        return (counted + torch.nan_to_num(d - d)).sum(-1, keepdim=keepdim)  # of d, with gradient 0
    if p == 1:
        return size.sum(-1, keepdim=keepdim)
    if p == math.inf:
        # every entry of the largest size gets the gradient
        if d.shape[-1] == 0:
            return size.sum(-1, keepdim=keepdim)
        most = size.detach().amax(-1, keepdim=True)
        moves = (size.detach() == most) & most.isfinite()
        chosen = torch.where(moves, size - size.detach(), torch.zeros_like(size)).sum(-1, keepdim=True)
        whole = most + chosen
        return whole if keepdim else whole.squeeze(-1)
    # the root is taken of 1 where the sum is 0: its slope there is infinite
    if p == 2:
        total = (d * d).sum(-1, keepdim=keepdim)
    else:
        total = torch.where(size == 0, torch.zeros_like(size), torch.where(size == 0, torch.ones_like(size), size) ** p)
        total = total.sum(-1, keepdim=keepdim)
    zero = total == 0
    safe = torch.where(zero, torch.ones_like(total), total)
    return torch.where(zero, torch.zeros_like(total), safe.sqrt() if p == 2 else safe ** (1 / p))


def _reference(x1, x2, p):
    wide = check.accumulate_dtype(x1.dtype)
    return (_length(x1.to(wide)[:, :, None, :] - x2.to(wide)[:, None, :, :], p).to(x1.dtype),)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *kept, *constants, needs[0], needs[1]


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of B."""
    moved = []
    for x, dim in zip(inputs, dims):
        x = x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        moved.append(x.reshape(batch * x.shape[1], *x.shape[2:]).contiguous())
    y = forward(*moved, *constants)
    return y.reshape(batch, y.shape[0] // batch, *y.shape[1:]), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 2, 2, _arguments, _reference, _fold, keep=(0,)))


def _order(op: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        check.fail(TypeError, op, "p", type(p).__name__, "a number")
    if not p >= 0:
        check.fail(RuntimeError, op, "p", p, "a number >= 0")
    return float(p)


def _same_kind(op: str, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if b.dtype != a.dtype:
        check.fail(RuntimeError, op, name, b.dtype, f"{a.dtype}, as the other tensor")
    if b.device != a.device:
        check.fail(RuntimeError, op, name, f"a tensor on {b.device}", f"one on {a.device}, as the other tensor")


def _batches(op: str, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
    """x1 [B, P, M], x2 [B, R, M], contiguous, and the batch dimensions they stand for."""
    for name, x in (("x1", x1), ("x2", x2)):
        check.floating(op, name, x)
        if x.dim() < 2:
            check.fail(RuntimeError, op, name, f"{x.dim()} dimensions", "at least 2")
    _same_kind(op, "x2", x1, x2)
    if x1.shape[-1] != x2.shape[-1]:
        check.fail(RuntimeError, op, "x2", f"{x2.shape[-1]} columns", f"{x1.shape[-1]}, as x1")
    try:
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    except RuntimeError:
        check.fail(RuntimeError, op, "x2", f"shape {list(x2.shape)}", f"one that broadcasts with {list(x1.shape)}")
    count = math.prod(batch)
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(count, *x.shape[-2:]).contiguous() for x in (x1, x2)]
    return flat[0], flat[1], batch


def cdist(
    x1: torch.Tensor,
    x2: torch.Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> torch.Tensor:
    """The distance of every row of x1 to every row of x2; drops in for torch.cdist.

    ``y[..., i, j] = ‖x1[..., i, :] - x2[..., j, :]‖_p``

    Args:
        x1: Tensor[*, P, M], float32, float64, bfloat16 or float16, any strides.
        x2: Tensor[*, R, M] of the same dtype; the leading dimensions broadcast.
        p: order of the norm, >= 0: 0 counts the entries that differ, infinity takes the largest difference.
        compute_mode: torch's names are taken and change nothing: differences are summed, never products.

    Returns:
        Tensor[*, P, R]; exactly 0 for equal rows, whose gradient is 0.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a negative p.
        NotImplementedError: a dtype without kernels.
        ValueError: an unknown compute_mode.

    Sums in float32 (float64). A NaN gives NaN in every order, where torch's largest difference skips it. Memory: the
    result and, on the CPU, a copy of x2; never P × R × M. Deterministic.
    Gradients of every order, forward mode, vmap, torch.compile; under autocast in float32, as in torch.
    """
    modes = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")
    if compute_mode not in modes:
        check.fail(ValueError, "cdist", "compute_mode", repr(compute_mode), f"one of {', '.join(modes)}")
    order = _order("cdist", p)
    x1, x2 = autocast.cast("cdist", x1, x2)  # type: ignore[assignment]
    a, b, batch = _batches("cdist", x1, x2)
    dtype = a.dtype
    if order == math.inf:
        # the gradient goes where the difference equals the distance, which a rounded distance does not tell
        a, b = a.to(check.accumulate_dtype(dtype)), b.to(check.accumulate_dtype(dtype))
    y = _apply(backend.namespace_for("cdist", x1), a, b, order).to(dtype)
    return y if y.shape[:-2] == batch else y.reshape(*batch, *y.shape[-2:])


def pairwise_distance(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> torch.Tensor:
    """``‖x1 - x2 + eps‖_p`` over the last dimension; drops in for torch.nn.functional.pairwise_distance.

    Args:
        x1, x2: Tensors that broadcast, floating.
        p: order of the norm, any number; entries that share the largest size (p = ∞) share the gradient, as in torch.
        eps: added to every difference, in torch so that the root has a slope.
        keepdim: keep the last dimension, of size 1.

    Returns:
        Tensor of the broadcast shape without its last dimension. Put together from torch's ops; at distance 0 the
        gradient is 0.

    Raises:
        RuntimeError: shapes that do not broadcast.
        NotImplementedError: a dtype that is not floating.
    """
    check.floating("pairwise_distance", "x1", x1)
    check.floating("pairwise_distance", "x2", x2)
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        check.fail(TypeError, "pairwise_distance", "p", type(p).__name__, "a number")
    check.broadcast("pairwise_distance", "x2", x2, "x1", x1.shape)
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    wide = check.accumulate_dtype(dtype)
    d = x1.to(wide) - x2.to(wide) + eps
    if d.dim() == 0 or not 0 < p < math.inf:
        return torch.linalg.vector_norm(d, p, dim=-1, keepdim=keepdim).to(dtype)
    return _length(d, float(p), keepdim).to(dtype)


def cosine_similarity(x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """``x1·x2 / (max(‖x1‖, eps) max(‖x2‖, eps))`` along a dimension; drops in for torch's function of that name.

    Args:
        x1, x2: Tensors that broadcast, floating.
        dim: the dimension that is summed.
        eps: least length that is divided by.

    Returns:
        Tensor of the broadcast shape without ``dim``. Put together from torch's ops, sums in float32 (float64). A
        length below eps is a constant for the gradient too, which so is that of the value; torch's is another there.

    Raises:
        RuntimeError: shapes that do not broadcast.
        NotImplementedError: a dtype that is not floating.
        IndexError: a dimension that is not there.
    """
    check.floating("cosine_similarity", "x1", x1)
    check.floating("cosine_similarity", "x2", x2)
    check.broadcast("cosine_similarity", "x2", x2, "x1", x1.shape)
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    wide = check.accumulate_dtype(dtype)
    a, b = torch.broadcast_tensors(x1.to(wide), x2.to(wide))
    if not -max(a.dim(), 1) <= dim < max(a.dim(), 1):
        check.fail(IndexError, "cosine_similarity", "dim", dim, f"one of {a.dim()} dimensions")
    a, b = (x.unsqueeze(0) if x.dim() == 0 else x for x in (a, b))  # of numbers, as in torch
    lengths = [_length(x.movedim(dim, -1), 2.0).clamp(min=eps) for x in (a, b)]
    return ((a * b).sum(dim) / (lengths[0] * lengths[1])).to(dtype)


def knn(query: torch.Tensor, data: torch.Tensor, k: int, p: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest rows of ``data`` for every row of ``query``, without the matrix of all distances.

    Args:
        query: Tensor[*, Q, M], float32, float64, bfloat16 or float16.
        data: Tensor[*, N, M] of the same dtype; the leading dimensions broadcast.
        k: how many, 1 to N.
        p: order of the norm, >= 0.

    Returns:
        (distances Tensor[*, Q, k] ascending, indices int64 Tensor[*, Q, k]). Among equal distances the lower index is
        first, whatever the number of threads; NaN comes last. The distances are differentiable, the indices are not.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, k out of range, a negative p.
        NotImplementedError: a dtype without kernels.

    Memory: k numbers for each row and thread block, beside the result. Deterministic. Equals
    ``torch.topk(torch.cdist(query, data, p), k, largest=False)``.
    """
    order = _order("knn", p)
    a, b, batch = _batches("knn", query, data)
    if isinstance(k, bool) or not isinstance(k, int):
        check.fail(TypeError, "knn", "k", type(k).__name__, "a whole number")
    if not 1 <= k <= b.shape[1]:
        check.fail(RuntimeError, "knn", "k", k, f"1 to {b.shape[1]}, the rows of data")
    with torch.no_grad():
        distances, indices = _search(backend.namespace_for("knn", query), a.detach(), b.detach(), k, order)
    if torch.is_grad_enabled() and (query.requires_grad or data.requires_grad):
        # of the k that were found, once more: Q × k × M numbers
        near = torch.gather(
            b.unsqueeze(1).expand(-1, a.shape[1], -1, -1), 2, indices.unsqueeze(-1).expand(-1, -1, -1, b.shape[2])
        )
        wide = check.accumulate_dtype(a.dtype)
        distances = _length(a.unsqueeze(2).to(wide) - near.to(wide), order).to(a.dtype)
    shape = (*batch, a.shape[1], k)
    return distances.reshape(shape), indices.reshape(shape)


class KNeighborsClassifier:
    """k-nearest-neighbour classifier: the most frequent class among the k nearest rows, the lowest one of a tie.

    Args:
        n_neighbors: k.
        p: order of the norm.

    ``fit(data [N, M], labels [N])`` keeps the rows; ``kneighbors(query)`` gives distances and indices,
    ``predict_proba`` the share of each class, ``predict`` the classes, ``score`` the accuracy. As in scikit-learn with
    uniform weights.
    """

    def __init__(self, n_neighbors: int = 5, p: float = 2.0) -> None:
        self.n_neighbors, self.p = n_neighbors, p
        self.data: torch.Tensor | None = None
        self.classes_ = self._labels = torch.empty(0, dtype=torch.int64)

    def fit(self, data: torch.Tensor, labels: torch.Tensor) -> KNeighborsClassifier:
        """Keeps data [N, M] and labels [N].

        Raises:
            RuntimeError: not one label a row, or fewer rows than neighbours.
        """
        name = type(self).__name__
        if data.dim() != 2 or labels.shape != data.shape[:1]:
            got = f"shapes {list(data.shape)} and {list(labels.shape)}"
            check.fail(RuntimeError, name, "labels", got, "data [N, M] and labels [N]")
        if len(data) < self.n_neighbors:
            check.fail(RuntimeError, name, "n_neighbors", self.n_neighbors, f"at most {len(data)}, the rows of data")
        self.data = data
        self.classes_, self._labels = labels.unique(return_inverse=True)
        return self

    def _fitted(self) -> torch.Tensor:
        if self.data is None:
            check.fail(RuntimeError, type(self).__name__, "data", "none", "a call of fit first")
        return self.data

    def kneighbors(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distances [Q, k], indices [Q, k]) of the nearest rows."""
        return knn(query, self._fitted(), self.n_neighbors, self.p)

    def predict_proba(self, query: torch.Tensor) -> torch.Tensor:
        """[Q, classes]: the share of each class among the neighbours, float64."""
        _, indices = self.kneighbors(query)
        votes = torch.zeros(len(query), len(self.classes_), dtype=torch.float64, device=query.device)
        near = self._labels[indices]
        return votes.scatter_add_(1, near, torch.full_like(near, 1, dtype=votes.dtype)) / self.n_neighbors

    def predict(self, query: torch.Tensor) -> torch.Tensor:
        """[Q]: the class with the most neighbours."""
        best = self.predict_proba(query).argmax(1)
        return self.classes_[best]

    def score(self, query: torch.Tensor, labels: torch.Tensor) -> float:
        """The share of the query whose class is predicted."""
        return (self.predict(query) == labels).double().mean().item()


# Blocks of rows of the Gram matrix: of b × b blocks, b (b + 1) / 2 are computed. Below this many rows one product is
# faster than several.
_GRAM_BLOCKS, _GRAM_LEAST = 4, 256


def gram_matrix(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``G[c, d] = scale Σ_n x[c, n] x[d, n]``: the products of all channels, for style losses.

    Args:
        x: Tensor[*, C, N], floating; feature maps [B, C, H, W] are flattened by ``x.flatten(2)``.
        scale: factor, for example 1 / (C H W).

    Returns:
        Tensor[*, C, C], exactly symmetric. Below 256 channels it is torch's whole matrix product, with whose gradient
        blocks are no faster; from there on only the blocks on and below the diagonal are computed, 10 of 16, and the
        others are their transposes. The gradient is (dG + dGᵀ) x, also where x is infinite.

    Raises:
        RuntimeError: fewer than two dimensions.
        NotImplementedError: a dtype that is not floating.
    """
    check.floating("gram_matrix", "x", x)
    if x.dim() < 2:
        check.fail(RuntimeError, "gram_matrix", "x", f"{x.dim()} dimensions", "at least 2")
    g = _gram(x)
    return g if scale == 1.0 else g * scale


def _gram(x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[-2]
    if rows < _GRAM_LEAST:
        return _mirrored(x @ x.mT)
    cuts = [rows * i // _GRAM_BLOCKS for i in range(_GRAM_BLOCKS + 1)]
    low = [x[..., cuts[i] : cuts[i + 1], :] @ x[..., : cuts[i + 1], :].mT for i in range(_GRAM_BLOCKS)]
    bands = []
    for i in range(_GRAM_BLOCKS):
        part = slice(cuts[i], cuts[i + 1])
        right = [low[j][..., :, part].mT for j in range(i + 1, _GRAM_BLOCKS)]
        bands.append(torch.cat([low[i][..., :, : cuts[i]], _mirrored(low[i][..., :, part]), *right], -1))
    return torch.cat(bands, -2)


def _mirrored(g: torch.Tensor) -> torch.Tensor:
    """The mean with the transpose: a product need not round (c, d) as it rounds (d, c). Its gradient is the mean with
    the transpose too; one of a triangle would multiply zeros with what is infinite.
    """
    half = 0.5 * g
    return half + half.mT


class PairwiseDistance(torch.nn.PairwiseDistance):
    """torch.nn.PairwiseDistance whose forward is pyops.functional.pairwise_distance."""

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class CosineSimilarity(torch.nn.CosineSimilarity):
    """torch.nn.CosineSimilarity whose forward is pyops.functional.cosine_similarity."""

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return cosine_similarity(x1, x2, self.dim, self.eps)


route((torch.cdist,), "cdist", cdist)
route((torch.nn.functional.pairwise_distance,), "pairwise_distance", pairwise_distance)
route((torch.nn.functional.cosine_similarity,), "cosine_similarity", cosine_similarity)


def _torch_cdist(x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    """torch's own, which has no half types, by differences."""
    wide = check.accumulate_dtype(x1.dtype)
    return torch.cdist(x1.to(wide), x2.to(wide), p, "donot_use_mm_for_euclid_dist").to(x1.dtype)


def _pair(first, second, **more):
    def make(t: Maker):
        return (t.input(first), t.input(second)), more

    return make


checked(
    "cdist",
    cdist,
    _torch_cdist,
    Sample("a ragged tile", _pair((3, 5), (4, 5)), derivatives=True),
    Sample("order 1", _pair((2, 3), (3, 3), p=1.0), derivatives=True),
    Sample("the largest difference", _pair((2, 4), (3, 4), p=math.inf), derivatives=True),
    Sample("order 3, a batch", _pair((2, 3, 2), (2, 2, 2), p=3.0), derivatives=True),
    Sample("order 1.5", _pair((3, 4), (2, 4), p=1.5)),
    Sample("a broadcast batch, several tiles", _pair((2, 1, 9, 6), (3, 70, 6))),
    Sample("no rows", _pair((0, 3), (4, 3))),
    Sample("one column", _pair((3, 1), (2, 1))),
)


composite("pairwise_distance", "cosine_similarity", "gram_matrix")
