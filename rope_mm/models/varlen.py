"""Block masks for flash-attn, which takes no mask: calls on queries and keys of variable lengths.

A run of text tokens is causal and sees all keys up to its end; a block of patches sees all keys up to its
end. So one causal call serves all runs of a batch, and one full call all blocks, whatever documents, frames,
padding and cached tokens there are. Keys that several runs see are copied for each of them: with many images
in a row flex_attention needs less memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# arguments of transformers that say the same as a call does
REPLACED = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "position_ids"


class Run(NamedTuple):
    """Queries one after another that see the same keys, or one more each.

    Attributes:
        start: the first query, among all b * s.
        stop: one past the last query.
        causal: whether they are text, each seeing those before it.
    """

    start: int
    stop: int
    causal: bool


class Call(NamedTuple):
    """One call of flash-attn on several runs.

    Attributes:
        queries: (m,), which of all b * s queries; None for all in order.
        keys: (n,), which of all keys; None for all in order.
        query_ends: cumulative numbers of the runs' queries, (runs + 1,) int32.
        key_ends: cumulative numbers of their keys, (runs + 1,) int32.
        longest: the most queries and the most keys of a run.
        causal: whether the runs are causal, aligned at their last query and key.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    causal: bool


@dataclass(frozen=True)
class VarlenMask:
    """What sees what, as calls; queries in none of them are padding, and come out as 0."""

    calls: tuple[Call, ...]

    def attend(
        self, backend: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention by transformers' flash attention function.

        Args:
            backend: the attention function.
            module: the attention module, which it reads.
            q: queries (b, h, s, d).
            k: keys (b, g, s, d), cached ones included.
            v: values (b, g, s, d).
            kwargs: of the function.

        Returns:
            Values (b, s, h, d), and no weights.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in REPLACED}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
        out = None
        for call in self.calls:
            heads = [x if i is None else x[i] for x, i in ((q, call.queries), (k, call.keys), (v, call.keys))]
            part, _ = backend(
                module,
                *(x[None].transpose(1, 2) for x in heads),
                None,
                is_causal=call.causal,
                cu_seq_lens_q=call.query_ends,
                cu_seq_lens_k=call.key_ends,
                max_length_q=call.longest[0],
                max_length_k=call.longest[1],
                **kwargs,
            )
            if call.queries is None:
                return part.view(shape), None
            out = part.new_zeros(q.shape) if out is None else out
            out = out.index_copy(0, call.queries, part[0])
        return (q.new_zeros(shape) if out is None else out.view(shape)), None


def make_varlen_mask(
    block_ids: Tensor, document_ids: Tensor | None, valid: Tensor | None, past: int, keys: int
) -> VarlenMask:
    """The calls of a batch; they are made on the CPU, for which a GPU waits once a forward.

    Args:
        block_ids: (b, s), see `make_mask_fn`.
        document_ids: (b, s), or None where each row is one document.
        valid: (b, past + s), 0 at padding; None where there is none.
        past: number of cached tokens.
        keys: number of keys of a row; those after past + s are empty places of a static cache.
    """
    (rows, length), device = block_ids.shape, block_ids.device
    blocks = block_ids.cpu().flatten()
    valid = torch.ones(rows, past + length) if valid is None else valid
    valid = valid.to("cpu", torch.bool)
    documents = torch.arange(rows)[:, None].expand(-1, length)
    if document_ids is not None:
        documents = documents * (1 + int(document_ids.max())) + document_ids.cpu()
    seen = valid[:, past : past + length].flatten()
    runs = find_runs(blocks, documents.flatten(), seen)
    places = torch.arange(length).repeat(rows) + past + torch.arange(rows).repeat_interleave(length) * keys
    cached = [row.nonzero()[:, 0] + number * keys for number, row in enumerate(valid[:, :past])]
    indices = []
    for run in runs:
        row = slice(run.start // length * length, (run.start // length + 1) * length)
        before = visible(blocks[row], documents.flatten()[row], run.start - row.start) & seen[row]
        if run.causal:
            before[run.start - row.start : run.stop - row.start] = True
        indices.append(torch.cat([cached[run.start // length], places[row][before]]))
    calls = []
    for causal in (True, False):
        chosen = [(run, index) for run, index in zip(runs, indices, strict=True) if run.causal == causal]
        if chosen:
            calls.append(make_call(chosen, causal, rows * length, rows * keys, device))
    return VarlenMask(tuple(calls))


def find_runs(blocks: Tensor, documents: Tensor, valid: Tensor) -> list[Run]:
    """The runs of tokens (n,) with these blocks and documents; padding is in none."""
    if not len(blocks):
        return []
    end = torch.zeros(1, dtype=torch.bool)
    beside = documents.diff() == 0
    same_block = beside & (blocks.diff() == 0)
    text = (blocks >= 0) & ~torch.cat([end, same_block]) & ~torch.cat([same_block, end])
    next_text = beside & text[1:] & text[:-1] & (blocks.diff() > 0)
    joined = (same_block | next_text) & valid[1:] & valid[:-1]
    starts = torch.cat([~end, ~joined]).nonzero()[:, 0]
    stops = torch.cat([starts[1:], torch.tensor([len(blocks)])])
    found = zip(starts.tolist(), stops.tolist(), text[starts].tolist(), strict=True)
    return [Run(*run) for run in found if valid[run[0]]]


def visible(blocks: Tensor, documents: Tensor, token: int) -> Tensor:
    """Which tokens (s,) of its row a token sees, by the rule of `make_mask_fn`."""
    block = blocks[token]
    earlier = (blocks >= 0) & (blocks < block.abs())
    return (documents == documents[token]) & (earlier | (blocks == block))


def make_call(
    runs: Sequence[tuple[Run, Tensor]], causal: bool, queries: int, keys: int, device: torch.device
) -> Call:
    """One call for runs and the keys (n,) of each, among a number of queries and keys."""
    query_index = torch.cat([torch.arange(run.start, run.stop) for run, _ in runs])
    key_index = torch.cat([index for _, index in runs])
    sizes = torch.tensor([(run.stop - run.start, len(index)) for run, index in runs])
    ends = torch.cat([torch.zeros(1, 2, dtype=torch.long), sizes.cumsum(0)]).to(device, torch.int32)
    longest = sizes.amax(0).tolist()
    return Call(
        None if torch.equal(query_index, torch.arange(queries)) else query_index.to(device),
        None if torch.equal(key_index, torch.arange(keys)) else key_index.to(device),
        ends[:, 0].contiguous(),
        ends[:, 1].contiguous(),
        (longest[0], longest[1]),
        causal,
    )
