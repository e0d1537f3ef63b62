"""Embedding: rows of a table by their number, alone or summed in bags.

    embedding      y[k] = w[index[k]]                                  dw[v] = sum over k with index[k] = v of dy[k]
    embedding_bag  y[b] = sum over k of bag b of scale[k] w[index[k]]  dw[v] = sum over k with index[k] = v of
                                                                               scale[k] dy[bag of k]

    maxima         y[b] = max over k of bag b of w[index[k]]           dw[v] = sum over k with index[k] = v of
                                                                               dy[bag of k] where k is the maximum

    w: [V, D], index: [K], dy: [K, D] or [bags, D]

Both gradients are sums over rows that are named by number, as a bag is: the entries are sorted by index (stable), and
one kernel, ``gather_sum``, serves the bags and the gradients. No atomics; the order of every sum is that of k.
Seen as a matrix with one entry for each k, a gradient is the product with its transpose, so the gradients of gradients
are the same two ops (docs/math/embedding.md).

Maxima are columns of different rows: each keeps the entry k it came from, the first of equal ones, and a row gathers
dy from the entries that name it.

Sources: torch.nn.functional.embedding, embedding_bag.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core import autograd, backend, check, library
from ..core.intercept import Unsupported, route
from ..core.multilinear import Multilinear, Tensors, differentiable, first
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("embedding")
_torch = torch.nn.functional

_rows_op = library.declare(
    "gather_rows(Tensor x, Tensor index, int padding_idx, bool scale_grad_by_freq) -> Tensor",
    lambda x, index, *_: x.new_empty(index.shape[0], x.shape[1]),
    _kernels,
)
_sum_op = library.declare(
    "gather_sum(Tensor x, Tensor index, Tensor offsets, Tensor? scale) -> Tensor",
    lambda x, index, offsets, scale: x.new_empty(offsets.shape[0] - 1, x.shape[1]),
    _kernels,
)

_max_op = library.declare(
    "gather_max(Tensor x, Tensor index, Tensor offsets, int padding) -> (Tensor, Tensor)",
    lambda x, index, offsets, padding: (
        x.new_empty(offsets.shape[0] - 1, x.shape[1]),
        index.new_empty(offsets.shape[0] - 1, x.shape[1]),
    ),
    _kernels,
)
_max_bwd_op = library.declare(
    "gather_max_bwd(Tensor dy, Tensor entry, Tensor order, Tensor bag, Tensor starts) -> Tensor",
    lambda dy, entry, order, bag, starts: dy.new_empty(starts.shape[0] - 1, dy.shape[1]),
    _kernels,
)


def _bags(key: torch.Tensor, rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(order, sorted, offsets)``: entries by key; those of key v are order[offsets[v]:offsets[v + 1]], v < rows."""
    ordered, order = torch.sort(key, stable=True)
    return order, ordered, torch.searchsorted(ordered, torch.arange(rows + 1, device=key.device))


def _bag_of(offsets: torch.Tensor, entries: Any) -> torch.Tensor:
    """The bag of each entry; the number of bags where an entry is in none behind the last."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(entries, device=offsets.device), right=True)


def _rows_gradient(namespace: str, dy: torch.Tensor, inputs: Tensors, constants: Tensors, needs: Any) -> Tensors:
    (x, index), (padding_idx, by_frequency) = inputs, constants
    key = index if padding_idx < 0 else torch.where(index == padding_idx, x.shape[0], index)
    order, ordered, offsets = _bags(key, x.shape[0])
    scale = None
    if by_frequency:
        counts = torch.cat([offsets.diff(), offsets.new_ones(1)])
        scale = counts[ordered].to(dy.dtype).reciprocal()
    return _gather_sum(namespace, dy, order, offsets, scale), None


def _rows_tangent(namespace: str, inputs: Tensors, tangents: Tensors, constants: Tensors) -> torch.Tensor:
    return _gather_rows(namespace, tangents[0], inputs[1], -1, False)


def _rows_fold(namespace: str, batch: int, dims: Tensors, inputs: Tensors, constants: Tensors) -> Any:
    """Tables side by side are one wide table; batches of indices are a longer one."""
    (x, index), (x_at, index_at) = inputs, dims
    if index_at is None:
        x = x.movedim(x_at, 1)
        y = _gather_rows(namespace, x.reshape(x.shape[0], -1), index, *constants)
        return y.view(index.shape[0], *x.shape[1:]), 1
    if x_at is None and not constants[1]:
        index = index.movedim(index_at, 0)
        y = _gather_rows(namespace, x, index.reshape(-1), *constants)
        return y.view(*index.shape, x.shape[1]), 0
    pairs = zip(first(batch, x_at, x).unbind(0), first(batch, index_at, index).unbind(0))
    return torch.stack([_gather_rows(namespace, a.contiguous(), i.contiguous(), *constants) for a, i in pairs]), 0


def _sum_gradient(namespace: str, dy: torch.Tensor, inputs: Tensors, constants: Tensors, needs: Any) -> Tensors:
    x, index, offsets, scale = inputs
    bag = _bag_of(offsets, index.shape[0])
    last = offsets.shape[0] - 1
    dx = dscale = None
    if needs[0]:
        order, _, starts = _bags(torch.where(bag < last, index, x.shape[0]), x.shape[0])
        by = None if scale is None else scale.index_select(0, order)
        dx = _gather_sum(namespace, dy, bag.index_select(0, order).clamp(max=max(last - 1, 0)), starts, by)
    if scale is not None and needs[3]:
        at = bag.clamp(max=max(last - 1, 0))
        product = _gather_rows(namespace, dy, at, -1, False) * _gather_rows(namespace, x, index, -1, False)
        dscale = torch.where(bag < last, product.sum(-1, dtype=check.accumulate_dtype(x.dtype)), 0).to(scale.dtype)
    return dx, None, None, dscale


def _sum_tangent(namespace: str, inputs: Tensors, tangents: Tensors, constants: Tensors) -> torch.Tensor:
    x, index, offsets, scale = inputs
    along, _, _, moved = tangents
    parts = [] if along is None else [_gather_sum(namespace, along, index, offsets, scale)]
    if moved is not None:
        parts.append(_gather_sum(namespace, x, index, offsets, moved.contiguous()))
    return sum(parts[1:], parts[0])


def _sum_fold(namespace: str, batch: int, dims: Tensors, inputs: Tensors, constants: Tensors) -> Any:
    x, *others = inputs
    if all(d is None for d in dims[1:]):
        x = x.movedim(dims[0], 1)
        y = _gather_sum(namespace, x.reshape(x.shape[0], -1), *others)
        return y.view(-1, *x.shape[1:]), 1
    each = [None if t is None else first(batch, d, t).unbind(0) for t, d in zip(inputs, dims)]
    calls = ([None if t is None else t[b].contiguous() for t in each] for b in range(batch))
    return torch.stack([_gather_sum(namespace, *arguments) for arguments in calls]), 0


_gather_rows = differentiable(Multilinear(_rows_op, 2, _rows_gradient, _rows_tangent, _rows_fold))
_gather_sum = differentiable(Multilinear(_sum_op, 4, _sum_gradient, _sum_tangent, _sum_fold))


def _max_reference(x, index, offsets, padding):
    bags, entries = offsets.shape[0] - 1, index.shape[0]
    bag = torch.where(index == padding, bags, _bag_of(offsets, entries))
    rows = x.index_select(0, index)
    by = bag.unsqueeze(1).expand(entries, x.shape[1])
    most = rows.detach().new_full((bags + 1, x.shape[1]), -torch.inf).scatter_reduce(0, by, rows.detach(), "amax")
    number = torch.arange(entries, device=x.device).unsqueeze(1).expand_as(by)
    number = torch.where(rows.detach() == most.gather(0, by), number, entries)
    entry = torch.full_like(most, entries, dtype=torch.int64).scatter_reduce(0, by, number, "amin")[:bags]
    found = torch.cat([rows, rows.new_zeros(1, x.shape[1])]).gather(0, entry)
    return found, torch.where(entry == entries, -1, entry)


def _max_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs: Any) -> Tensors:
    x, index, offsets = inputs
    bag = _bag_of(offsets, index.shape[0])
    last = offsets.shape[0] - 1
    order, _, starts = _bags(torch.where(bag < last, index, x.shape[0]), x.shape[0])
    return dy, kept[0], order, bag, starts


_gather_max: Any = autograd.differentiable(autograd.Formula(_max_op, _max_bwd_op, 3, 1, _max_arguments, _max_reference))


# The checks


def _table(op: str, weight: torch.Tensor) -> None:
    check.floating(op, "weight", weight)
    if weight.dim() != 2:
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", "[V, D]")


def _indices(op: str, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The indices as int64 [K]."""
    if not isinstance(input, torch.Tensor):
        check.fail(TypeError, op, "input", type(input).__name__, "a tensor")
    if input.dtype not in (torch.int64, torch.int32):
        check.fail(RuntimeError, op, "input", input.dtype, "int64 or int32")
    if input.device != weight.device:
        check.fail(RuntimeError, op, "input", f"a tensor on {input.device}", f"one on {weight.device}, as the weight")
    return input.reshape(-1).long().contiguous()


def _check_rows(op: str, index: torch.Tensor, weight: torch.Tensor) -> None:
    """Each index in [0, V)."""
    low, high = (int(v) for v in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= weight.shape[0]:
        wanted = f"indices in [0, {weight.shape[0]}), the rows of the weight"
        kind = RuntimeError if op == "embedding_bag" else IndexError  # as torch
        check.fail(kind, op, "input", low if low < 0 else high, wanted)


def _readable(t: torch.Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for a GPU or breaking a graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _explained(checks: Any, readable: bool, apply: Any, *args: Any) -> Any:
    """``apply(*args)``. The CPU kernels refuse what ``checks`` refuses, while they read; ``checks`` says it in the
    words of the function."""
    if not readable:
        return apply(*args)
    try:
        return apply(*args)
    except RuntimeError as error:
        refused = error
    checks()
    raise refused


def _padding(op: str, padding_idx: int | None, rows: int) -> int:
    """As a row of the table, -1 where there is none."""
    if padding_idx is None:
        return -1
    if not isinstance(padding_idx, int) or isinstance(padding_idx, bool):
        check.fail(TypeError, op, "padding_idx", type(padding_idx).__name__, "an int or None")
    if not -rows <= padding_idx < rows:
        check.fail(AssertionError, op, "padding_idx", padding_idx, f"a row of a table of {rows} rows")
    return padding_idx % rows


def _renormalise(weight: torch.Tensor, index: torch.Tensor, max_norm: float, norm_type: float) -> None:
    """Scales the rows that are named, in place, to a norm of at most ``max_norm``."""
    with torch.no_grad():
        named = torch.unique(index)
        rows = weight.index_select(0, named)
        norms = torch.linalg.vector_norm(rows, norm_type, dim=1, keepdim=True)
        shrunk = torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)
        weight.detach().index_copy_(0, named, shrunk)


# The functions


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """``weight[input]``; drops in for torch.nn.functional.embedding.

    Args:
        input: int64 or int32 Tensor[*], indices in [0, V).
        weight: Tensor[V, D] in float32, float64, bfloat16 or float16.
        padding_idx: a row that gets no gradient.
        max_norm: rows that are named and have a larger norm are scaled down to it first, in place.
        norm_type: p of that norm.
        scale_grad_by_freq: the gradient of a row is divided by how often it is named.
        sparse: a sparse gradient.

    Returns:
        Tensor[*, D], contiguous.

    Raises:
        IndexError: an index outside [0, V), on the CPU; on a GPU its row is NaN, and nothing is read.
        RuntimeError: a weight of another rank, indices of another dtype.
        AssertionError: ``padding_idx`` is no row of the table.
        Unsupported (NotImplementedError): ``sparse`` where a gradient is wanted; ``pyops.use`` leaves it to torch.

    The gradient sums the rows of each index in the order of ``input``, in float32 for half types: deterministic.
    """
    _table("embedding", weight)
    index = _indices("embedding", input, weight)
    padding = _padding("embedding", padding_idx, weight.shape[0])
    if sparse and weight.requires_grad and torch.is_grad_enabled():
        raise Unsupported("embedding: argument 'sparse': got True, expected False: gradients are dense")
    namespace = backend.namespace_for("embedding", weight)
    readable = _readable(index) and not torch._C._are_functorch_transforms_active()
    if readable and (namespace != "pyops" or max_norm is not None):
        _check_rows("embedding", index, weight)
    if max_norm is not None:
        _renormalise(weight, index, float(max_norm), float(norm_type))
    args = namespace, weight.contiguous(), index, padding, bool(scale_grad_by_freq)
    y = _explained(lambda: _check_rows("embedding", index, weight), readable, _gather_rows, *args)
    return y.view(*input.shape, weight.shape[1])


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Sums, means or maxima of bags of rows, without the rows between; drops in for torch.nn.functional.embedding_bag.

    Args:
        input: int64 or int32 Tensor[bags, n], or Tensor[K] cut into bags by ``offsets``.
        weight: Tensor[V, D] in float32, float64, bfloat16 or float16.
        offsets: Tensor[bags], where each bag begins; [bags + 1] with ``include_last_offset``.
        max_norm, norm_type: as in ``embedding``.
        scale_grad_by_freq: the gradient of a row is divided by how often it is named; the rows are then gathered first.
        mode: ``"sum"``, ``"mean"`` or ``"max"``; an empty bag gives 0.
        per_sample_weights: Tensor of input's shape and the weight's dtype, a factor for each row, with ``"sum"``.
        padding_idx: rows of this index take no part, nor do they count in a mean.

    Returns:
        Tensor[bags, D].

    Raises:
        RuntimeError: an index outside [0, V), on the CPU; on a GPU the bag is NaN.
        ValueError: offsets and ranks that do not fit, or an unknown mode.
        RuntimeError: offsets that do not begin at 0, decrease or pass the end.
        ValueError: ``scale_grad_by_freq`` or ``sparse`` with mode ``"max"``.
        NotImplementedError: per_sample_weights with another mode than ``"sum"``; Unsupported: ``sparse`` where a
            gradient is wanted: ``pyops.use`` leaves it to torch.

    Of equal maxima the first has the gradient; a NaN that comes first stays, a later one is passed over, as in torch.
    """
    op = "embedding_bag"
    _table(op, weight)
    if mode not in ("sum", "mean", "max"):
        check.fail(ValueError, op, "mode", repr(mode), "'sum', 'mean' or 'max'")
    if (scale_grad_by_freq or sparse) and mode == "max":
        wanted = "False with mode 'max'"
        check.fail(ValueError, op, "scale_grad_by_freq" if scale_grad_by_freq else "sparse", True, wanted)
    if sparse and weight.requires_grad and torch.is_grad_enabled():
        raise Unsupported("embedding_bag: argument 'sparse': got True, expected False: gradients are dense")
    if per_sample_weights is not None:
        if mode != "sum":
            check.fail(NotImplementedError, op, "per_sample_weights", f"a tensor with mode {mode!r}", "mode 'sum'")
        if per_sample_weights.shape != input.shape:
            wanted = f"{list(input.shape)}, as the input"
            check.fail(ValueError, op, "per_sample_weights", f"shape {list(per_sample_weights.shape)}", wanted)
        if per_sample_weights.dtype != weight.dtype:
            check.fail(RuntimeError, op, "per_sample_weights", per_sample_weights.dtype, f"{weight.dtype}")
    index = _indices(op, input, weight)
    padding = _padding(op, padding_idx, weight.shape[0])
    ends = _offsets(input, offsets, include_last_offset, index.shape[0])
    namespace, readable = backend.namespace_for(op, weight), _readable(index)
    transformed = torch._C._are_functorch_transforms_active()

    def checks() -> None:
        if not transformed:
            _check_rows(op, index, weight)
        _check_offsets(op, offsets, ends, index.shape[0])

    # The CPU kernels check the offsets, and the entries of the bags as they read them.
    shares = mode == "mean" and padding < 0 and readable and not (include_last_offset or transformed)
    looks = (
        namespace == "pyops"
        and (shares or mode != "mean")
        and max_norm is None
        and not (scale_grad_by_freq or include_last_offset)
    )
    if readable and (transformed or not looks):
        checks()
    if max_norm is not None:
        _renormalise(weight, index, float(max_norm), float(norm_type))
    table = weight.contiguous()
    if mode == "max":
        return _explained(checks, readable, _gather_max, namespace, table, index, ends, padding)[0]
    scale = None if per_sample_weights is None else per_sample_weights.reshape(-1).contiguous()
    counted = None if padding < 0 else (index != padding).to(weight.dtype)
    if shares:
        sizes = ends.diff()
        if ends[0] != 0 or (sizes < 0).any():
            checks()
        # of an entry in the mean of its bag; the sizes are those of all entries, so no more is written than there is
        share = sizes.to(check.accumulate_dtype(weight.dtype)).reciprocal().to(weight.dtype)
        scale = share.repeat_interleave(sizes, output_size=index.shape[0])
    elif mode == "mean":
        bag = _bag_of(ends, index.shape[0])
        ones = torch.ones_like(index) if padding < 0 else (index != padding).long()
        sums = torch.cat([ones.new_zeros(1), ones.cumsum(0)])
        counts = (sums[ends[1:]] - sums[ends[:-1]]).clamp(min=1)
        wide = counts.to(check.accumulate_dtype(weight.dtype)).reciprocal()
        scale = torch.cat([wide, wide.new_zeros(1)])[bag].to(weight.dtype)
    if counted is not None:
        scale = counted if scale is None else scale * counted
    if scale_grad_by_freq:
        table = _gather_rows(namespace, table, index, padding, True)
        index = torch.arange(index.shape[0], device=index.device)
    return _explained(checks, readable, _gather_sum, namespace, table, index, ends, scale)


def _offsets(input: torch.Tensor, offsets: torch.Tensor | None, include_last: bool, entries: int) -> torch.Tensor:
    """Where each bag begins, and where the last ends."""
    op = "embedding_bag"
    if input.dim() == 2:
        if offsets is not None:
            check.fail(ValueError, op, "offsets", "a tensor", "None: the rows of a 2-D input are the bags")
        bags, each = input.shape
        return torch.arange(bags + 1, device=input.device) * each
    if input.dim() != 1 or offsets is None or offsets.dim() != 1:
        check.fail(ValueError, op, "offsets", offsets if offsets is None else list(offsets.shape), "[bags], input [K]")
    starts = offsets.long()
    if not include_last:
        starts = torch.constant_pad_nd(starts, (0, 1), entries)
    return starts


def _check_offsets(op: str, offsets: torch.Tensor | None, starts: torch.Tensor, entries: int) -> None:
    """Those that were given rise from 0, and end within the entries."""
    if offsets is not None and (starts[0] != 0 or (starts.diff() < 0).any() or starts[-1] > entries):
        check.fail(RuntimeError, op, "offsets", offsets.tolist(), f"numbers that rise from 0 to at most {entries}")


# The modules


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding whose forward is pyops.functional.embedding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class EmbeddingBag(torch.nn.EmbeddingBag):
    """torch.nn.EmbeddingBag whose forward is pyops.functional.embedding_bag."""

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return embedding_bag(
            *(input, self.weight, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode),
            *(self.sparse, per_sample_weights, self.include_last_offset, self.padding_idx),
        )


# Routes and samples


def _accepts(input: Any, weight: Any, *_: Any, **__: Any) -> str | None:
    return None if weight.dtype in check.FLOATING else f"dtype {weight.dtype}"


route((_torch.embedding,), "embedding", embedding, _accepts)
route((_torch.embedding_bag,), "embedding_bag", embedding_bag, _accepts)


def _sample(shape, table, **how):
    def make(t: Maker):
        index = ((torch.arange(torch.Size(shape).numel()) * 7 + 3) % 11 % table[0]).reshape(shape).to(t.device)
        return (index, t.input(table)), how

    return make


def _embedding_truth(index, table, **how):
    """torch's gradient reads out of bounds on a GPU where rows are empty."""
    return _torch.embedding(index, table, **how) if table.shape[1] else table[index]


def _bag_truth(index, table, offsets, per_sample_weights=None, **how):
    """torch has no gradients of weights and of maxima in half types on a GPU."""
    if not table.is_cuda or table.dtype in (torch.float32, torch.float64):
        return _torch.embedding_bag(index, table, offsets, per_sample_weights=per_sample_weights, **how)
    weights = None if per_sample_weights is None else per_sample_weights.float()
    return _torch.embedding_bag(index, table.float(), offsets, per_sample_weights=weights, **how).to(table.dtype)


checked(
    "embedding",
    embedding,
    _embedding_truth,
    Sample("rows named twice and not at all", _sample((5,), (4, 3)), derivatives=True),
    Sample("padding", _sample((2, 6), (5, 3), padding_idx=3)),
    Sample("scaled by frequency", _sample((40,), (9, 17), scale_grad_by_freq=True, padding_idx=-1)),
    Sample("wide rows, vectors", _sample((3, 4), (11, 2056))),
    Sample("one index", _sample((), (12, 8))),
    Sample("no indices", _sample((0, 2), (3, 4))),
    Sample("rows of nothing", _sample((3,), (3, 0))),
)


def _bag_sample(starts, count, table, weighted=False, **how):
    def make(t: Maker):
        index = ((torch.arange(count) * 7 + 3) % 11 % table[0]).to(t.device)
        extra = {"per_sample_weights": t.input((count,))} if weighted else {}
        return (index, t.input(table), torch.tensor(starts, device=t.device)), {**how, **extra}

    return make


checked(
    "embedding_bag",
    embedding_bag,
    _bag_truth,
    Sample("means, an empty bag", _bag_sample([0, 2, 2, 5], 7, (5, 3)), derivatives=True),
    Sample("sums by weight", _bag_sample([0, 3], 6, (5, 3), True, mode="sum"), derivatives=True),
    Sample("padding", _bag_sample([0, 4, 20], 30, (9, 33), mode="mean", padding_idx=2)),
    Sample("maxima, an empty bag", _bag_sample([0, 2, 2, 5], 7, (5, 3), mode="max"), derivatives=True),
    Sample("maxima without padding, wide rows", _bag_sample([0, 4, 20], 30, (9, 133), mode="max", padding_idx=2)),
    Sample("long bags, wide rows", _bag_sample([0, 40, 41], 90, (11, 1032), mode="sum")),
)
