"""Several documents in one row: which share a row, and where their tokens stand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rope_mm.checks.tensors import WHOLE
from rope_mm.positions.place import check_rows, place
from rope_mm.segments import Segment


def too_long_message(length: int, room: int) -> str:
    """What is said of a document that is longer than a row; both in tokens."""
    return f"a document of {length} tokens does not fit a row of {room}; raise the length and begin anew"


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the documents in each row: every one, in order, goes into the first row that has room.

    Args:
        lengths: of the documents, in tokens.
        room: of a row, in tokens.

    Raises:
        ValueError: a document that is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        if length > room:
            raise ValueError(too_long_message(length, room))
        row = next((row for row, free in enumerate(left) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(number)
        left[row] -= length
    return rows


def pack(
    rows: Sequence[str | Sequence[Segment]], layout: str = "rope-tv", **options: Any
) -> tuple[Tensor, Tensor]:
    """Positions (s, a) of sequences in one row, each counted from its own start, and their numbers (s,).

    Args:
        rows: sequences of segments, or their text forms.
        layout: a key of LAYOUTS.
        options: the layout's own numbers.

    Raises:
        ValueError: as `place`, and where there is no sequence.
    """
    check_rows(rows)
    blocks = [place(row, layout, **options)[0] for row in rows]
    lengths = torch.tensor([len(block) for block in blocks], device="cpu")
    return torch.cat(blocks), torch.repeat_interleave(lengths)


def positions_of(cu_seqlens: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Token positions (s,) of documents in one row, which start anew in each document.

    Text whose scheme has several axes stands at the same position on all of them:
    `positions_of(cu_seqlens)[:, None].expand(-1, a)`.

    Args:
        cu_seqlens: (n + 1,), where documents begin and the row ends, 0, ..., s, as flash-attn counts.
        offsets: (n,), where the first token of each document stands, as of the rest of a longer one; 0 if
            None.

    Raises:
        ValueError: numbers that do not rise from 0, or not one offset for each document.

    Examples:
        >>> positions_of(torch.tensor([0, 3, 5])).tolist()
        [0, 1, 2, 0, 1]
        >>> positions_of(torch.tensor([0, 3, 5]), torch.tensor([0, 7])).tolist()
        [0, 1, 2, 7, 8]
    """
    ends = check_cu_seqlens(cu_seqlens)
    begins, lengths = ends[:-1], ends.diff()
    if offsets is None:
        offsets = torch.zeros_like(begins)
    countable = is_dense(offsets, (*WHOLE, torch.float32, torch.float64)) and offsets.shape == begins.shape
    if not countable or not offsets.isfinite().all():
        raise ValueError(
            f"{len(begins)} documents need an offset each, {tuple(begins.shape)} finite numbers in a tensor, "
            f"not {described(offsets)}"
        )
    shift = (offsets.to(ends.device) - begins).repeat_interleave(lengths)
    return torch.arange(len(shift), device=ends.device) + shift


def is_dense(x: Any, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether it is a dense tensor of one of these dtypes, with numbers."""
    return isinstance(x, Tensor) and x.dtype in dtypes and x.layout == torch.strided and not x.is_meta


def described(x: Any) -> str:
    """What was given, in a line."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) and not x.is_nested else repr(x)


def check_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """Cumulative lengths of documents (n + 1,), checked, as int64.

    Raises:
        ValueError: what does not rise from 0 in whole numbers.
    """
    if not is_dense(cu_seqlens, WHOLE) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cumulative lengths must be a tensor of whole numbers 0, ..., s, one more than there are "
            f"documents, not {described(cu_seqlens)}"
        )
    ends = cu_seqlens.long()
    if ends[0] != 0 or (ends.diff() < 1).any():
        raise ValueError(f"cumulative lengths must begin with 0 and rise, not {cu_seqlens.tolist()}")
    return ends
