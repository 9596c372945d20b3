"""What rotation in place refuses: q and k that share elements, leaves that require grad, expanded tensors."""

from functools import lru_cache

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from rope_mm_kernels.checks import IS_EXPORTING, NAMESPACE

SHARED = "q and k share elements, which would be rotated twice; call rotate"


@lru_cache(maxsize=1024)
def shares_elements(terms: tuple[tuple[int, int, int], ...], gap: int) -> bool:
    """Whether gap + sum of m * stride, low <= m <= high, is 0 for any m: exactly, from the longest stride on.

    Args:
        terms: (stride, low, high), strides > 0 that fall.
        gap: elements between the starts of two views of one memory.
    """
    if not terms:
        return gap == 0
    (stride, low, high), *rest = terms
    below, above = (sum(term[0] * term[end] for term in rest) for end in (1, 2))
    first = max(low, -((gap + above) // stride))
    last = min(high, -(gap + below) // stride)
    return any(shares_elements(tuple(rest), gap + m * stride) for m in range(first, last + 1))


def to_int(x: int | torch.SymInt) -> int:
    """A size or, of a dynamic graph, what it is in the call for which the graph is made."""
    return x if isinstance(x, int) else x.node.hint


def unwrap(x: Tensor) -> Tensor:
    """The tensor in memory that a transform of torch.func wraps, batch included: a wrapper has no memory."""
    while functorch.is_batchedtensor(x) or functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


def measure_gap(q: Tensor, k: Tensor) -> int | None:
    """Elements from the first of q to the first of k; None where they lie in other memory."""
    if torch._C._is_alias_of(q, k):  # pyright: ignore[reportAttributeAccessIssue]
        return to_int(k.storage_offset() - q.storage_offset())
    if any(x.is_meta or type(x) not in (Tensor, torch.nn.Parameter) for x in (q, k)):
        return None  # without addresses
    # torch does not know that a tensor from numpy or DLPack has the memory of another
    (low, end), (other, other_end) = (
        (s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (q.untyped_storage(), k.untyped_storage())
    )
    if end <= other or other_end <= low:
        return None
    gap, rest = divmod(k.data_ptr() - q.data_ptr(), q.element_size())
    return None if rest else gap


def overlap(q: Tensor, k: Tensor) -> bool:
    """Whether an element of q is one of k."""
    if q is k:
        return True
    q, k = unwrap(q), unwrap(k)
    if not q.numel() or not k.numel() or (gap := measure_gap(q, k)) is None:
        return False
    reach: dict[int, tuple[int, int]] = {}  # for each stride, how far the indices of k are beyond those of q
    for x, sign in ((q, -1), (k, 1)):
        for size, stride in zip(map(to_int, x.shape), map(to_int, x.stride()), strict=True):
            low, high = reach.get(stride, (0, 0))
            reach[stride] = (low - (size - 1), high) if sign < 0 else (low, high + size - 1)
    terms = sorted(((stride, *ends) for stride, ends in reach.items() if stride), reverse=True)
    return shares_elements(tuple(terms), gap)


def refuse_overlap(q: Tensor, k: Tensor) -> None:
    """Refuse q and k of which one element is shared."""
    if overlap(q, k):
        raise ValueError(SHARED)


@torch.library.custom_op(f"{NAMESPACE}::check_overlap", mutates_args=())
def check_overlap_op(q: Tensor, k: Tensor) -> Tensor:
    """`refuse_overlap` as an op: a compiled graph knows the addresses when it runs."""
    refuse_overlap(q, k)
    return q.new_ones((), dtype=torch.bool)


@check_overlap_op.register_fake
def make_fake_overlap(q: Tensor, k: Tensor) -> Tensor:
    """The shape of the answer of `check_overlap_op`; views that a graph makes are looked at here."""
    known = (*q.shape, *q.stride(), q.storage_offset(), *k.shape, *k.stride(), k.storage_offset())
    if all(isinstance(x, int) or x.node.hint is not None for x in known):  # or they depend on the data
        refuse_overlap(q, k)
    return q.new_empty((), dtype=torch.bool)


@check_overlap_op.register_vmap
def check_batched_overlap(_info, _in_dims, q: Tensor, k: Tensor) -> tuple[Tensor, None]:
    """`check_overlap_op` of whole batches: torch would loop over copies of their rows."""
    return check_overlap_op(q, k), None


def check_in_place(q: Tensor, k: Tensor) -> None:
    """Refuse q and k that rotation in place would corrupt."""
    if q is k or not torch.compiler.is_dynamo_compiling():  # torch.export, too, unless strict
        refuse_overlap(q, k)
    elif IS_EXPORTING is not None and not IS_EXPORTING():
        torch._assert_async(check_overlap_op(q.detach(), k.detach()), SHARED)  # keeps the op in the graph
    if torch.is_grad_enabled() and any(x.requires_grad and x.is_leaf for x in (q, k)):
        raise ValueError("q or k is a leaf that requires grad, which must not be overwritten; call rotate")
    if any(size > 1 and not stride for x in (q, k) for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("q or k is expanded, so that one element stands for many; call rotate")
