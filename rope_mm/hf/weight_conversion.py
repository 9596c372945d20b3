"""Weights for another pairing or ownership: channels of q and k reordered, attention scores unchanged."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_mm.registry import Registry
from rope_mm.rotary.definition import PAIRINGS, apply_rotary
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES, read_scheme

# modules whose rows are heads of q or of k, and norms of such heads; the ends of their names, as patterns
NAMES = ("[qk]_proj", "[qk]_norm", "qk_norm", r"[qk]_layernorm(\.norms\.\d+)?", "to_[qk]", "norm_[qk]")
FUSED = re.compile(r"\b(qkv|qkv_proj|query_key_value|c_attn|wqkv|Wqkv|in_proj_qkv|W_pack)$")

HeadIndex = tuple[int, int] | None  # index of a head and the number of heads of its kind; None for values


def heads_only(blocks: int, kv: int) -> list[HeadIndex]:
    """Heads of q, or of k, by themselves."""
    return [(head, blocks) for head in range(blocks)]


def gated(blocks: int, kv: int) -> list[HeadIndex]:
    """After each query head a gate for its values (Qwen3-Next, Qwen3.5)."""
    return [place for query in heads_only(blocks // 2, kv) for place in (query, None)]


def queries(blocks: int, kv: int) -> list[HeadIndex]:
    """Query heads among blocks of head_dim rows, kv of which are keys and kv values.

    Raises:
        ValueError: where keys and values leave no queries, or not as many for each key.
    """
    heads = blocks - 2 * kv
    if heads < 1 or heads % kv:
        raise ValueError(f"{blocks} heads are not {kv} of keys, {kv} of values and queries; give kv_heads=")
    return heads_only(heads, kv)


def stacked(blocks: int, kv: int) -> list[HeadIndex]:
    """All queries, then all keys, then all values (Phi-3, Qwen2-VL's tower)."""
    return [*queries(blocks, kv), *heads_only(kv, kv), *[None] * kv]


def grouped(blocks: int, kv: int) -> list[HeadIndex]:
    """For every key head its queries, itself and its values (GPT-NeoX, Persimmon, Falcon, InternLM2)."""
    of_queries, keys = queries(blocks, kv), heads_only(kv, kv)
    each = len(of_queries) // kv
    return [place for k in range(kv) for place in [*of_queries[k * each : (k + 1) * each], keys[k], None]]


FUSED_LAYOUTS: Registry[Callable[[int, int], list[HeadIndex]]] = Registry(
    "order of heads", {"alone": heads_only, "gated": gated, "stacked": stacked, "grouped": grouped}
)


def convert_pairing(
    state_dict: Mapping[str, Tensor],
    from_: str | Scheme,
    to: str | Scheme,
    *,
    head_dim: int,
    heads: int | None = None,
    only: str = "",
    names: Sequence[str] = NAMES,
    fused: Mapping[str, str] | None = None,
    kv_heads: int | None = None,
) -> dict[str, Tensor]:
    """Weights for the scheme `to` with the attention scores that `state_dict` has under `from_`.

    Rows of projections of q and k, their biases and the norms of q and k are reordered within each head. All
    other weights are returned as they are, and `state_dict` is not changed.

    Args:
        state_dict: names and weights, those of linear layers (out, in).
        from_: a Scheme, a key of SCHEMES, or a pairing of the other one's scheme (of "flat" if both are).
        to: likewise.
        head_dim: channels of a head.
        heads: rows of a per-head Omega, as given to Rotary.
        only: a pattern that names must contain, such as "^visual." where towers differ.
        names: patterns for the ends of the modules' names.
        fused: modules with more than q or k in them, and their order: {"qkv_proj": "stacked"} for q | k | v,
            {"query_key_value": "grouped"} for q, k, v of one key head after another, {"q_proj": "gated"} for
            a gate after each query.
        kv_heads: key heads in a fused projection; None: as many as query heads.

    Raises:
        ValueError: no such reordering exists, no weight has such a name, rows that are not whole heads, or
            a fused projection that `fused` does not name.

    Examples:
        >>> weights = {"q_proj.weight": torch.arange(4.0)[:, None]}
        >>> convert_pairing(weights, "half", "interleaved", head_dim=4)["q_proj.weight"].flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    source = reordering(*read_both(from_, to), head_dim, heads)
    orders = dict(fused or {})
    alike = re.compile(rf"(^|\.)({'|'.join([*names, *map(re.escape, orders)])})$")
    converted, found = dict(state_dict), False
    for name, weight in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if not re.search(only, name):
            continue
        if (which := alike.search(module)) and leaf in ("weight", "bias"):
            key = module.rpartition(".")[2]
            if key not in orders:
                refuse_gates(name, state_dict)
            order = FUSED_LAYOUTS[orders.get(key, "alone")]
            rows = weight.flatten() if "norm" in which.group() else weight
            converted[name] = permute_rows(name, rows, source, order, kv_heads).view(weight.shape)
            found = True
        else:
            check_unhandled(name, alike)
    if not found:
        raise ValueError(
            f"no weight is named like {', '.join([*names, *orders])} (only={only!r}); give names="
        )
    return converted


def refuse_gates(name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse queries that may hold gates.

    Raises:
        ValueError: a q_proj of twice as many rows as the o_proj beside it has columns.
    """
    out = state_dict.get(re.sub(r"q_proj\.\w+$", "o_proj.weight", name))
    if "q_proj." in name and out is not None and len(state_dict[name]) == 2 * out.shape[-1]:
        raise ValueError(
            f"{name} has twice the rows that o_proj takes, as where each query has a gate; say "
            "fused={'q_proj': 'gated'}, or 'alone' where it has none"
        )


def check_unhandled(name: str, alike: re.Pattern[str]) -> None:
    """Refuse a weight that belongs to q or k but cannot be reordered.

    Raises:
        ValueError: an adapter or a scale below a converted module, or a fused projection.
    """
    parents = name.split(".")
    modules = [".".join(parents[:n]) for n in range(1, len(parents))]
    if any(map(alike.search, modules)):
        raise ValueError(
            f"{name} belongs to q or k but is no weight or bias; merge adapters and dequantize first"
        )
    if any(map(FUSED.search, modules)):
        raise ValueError(
            f"{name} holds q, k and v in one; say how with fused={{name: 'stacked' or 'grouped'}}, "
            "or exclude it with only="
        )


def read_both(from_: str | Scheme, to: str | Scheme) -> tuple[Scheme, Scheme]:
    """Both schemes; a pairing's name is the other scheme with that pairing, or "flat" with it."""
    named = [read_scheme(x) for x in (from_, to) if x not in PAIRINGS] or [SCHEMES["flat"]]
    first, last = (named[0].replace(pairing=x) if x in PAIRINGS else read_scheme(x) for x in (from_, to))
    return first, last


def pairs_of(scheme: Scheme, head_dim: int, heads: int | None) -> tuple[Tensor, Tensor]:
    """The frequencies of each pair (n, d/2, c), at a short and a long length, and its channels (d/2, 2).

    Channels outside the slot are pairs too, in order, with frequency 0. Which channels pair is read from
    the rotation itself: a quarter turn times a number leaves that number on both, its sign on one.
    """
    omega = torch.cat([scheme.omega(head_dim, heads, length) for length in (0.0, 2.0**30)], dim=-2)
    columns = (omega if heads else omega[None]).transpose(-1, -2)
    pairs = columns.shape[1]
    number = torch.arange(2.0, pairs + 2).view(1, 1, pairs)
    turned = apply_rotary(
        torch.ones(1, 1, 1, head_dim), torch.zeros_like(number), number, scheme.pairing,
        scheme.blocks(head_dim), scheme.channel_offset == "end",
    ).flatten()  # fmt: skip
    channels = torch.where(turned == 1, torch.inf, 4 * turned.abs() + turned.sign()).argsort(stable=True)
    return pad(columns, (0, 0, 0, head_dim // 2 - pairs)), channels.view(-1, 2)


def equal_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Whether pair i of the first (n, r, c) has the frequencies of pair j of the second: (n, r, r)."""
    return torch.isclose(first[:, :, None], second[:, None], rtol=1e-9, atol=0).all(-1)


def reordering(source: Scheme, target: Scheme, head_dim: int, heads: int | None = None) -> Tensor:
    """For every channel of a target head the source channel that it takes: (n, d) for n Omegas.

    A pair takes the first unused pair of the same frequencies.

    Raises:
        ValueError: schemes of other axes, factors or frequencies, or of learned ones.
    """
    if source.axes != target.axes:
        raise ValueError(f"{source.axes} cannot become {target.axes}: both schemes need the same axes")
    if source.attention_scaling != target.attention_scaling:
        raise ValueError(
            f"a factor of {source.attention_scaling} on cosine and sine cannot become "
            f"{target.attention_scaling}"
        )
    if (source.learnable or target.learnable) and source.replace(pairing=target.pairing) != target:
        raise ValueError(
            "learned frequencies are not the scheme's: of a learnable scheme change the pairing alone"
        )
    (old, old_channels), (new, new_channels) = (pairs_of(x, head_dim, heads) for x in (source, target))

    def count_before(columns: Tensor) -> Tensor:
        return equal_pairs(columns, columns).tril(-1).sum(-1)

    match = equal_pairs(new, old) & (count_before(new)[:, :, None] == count_before(old)[:, None])
    if unmatched := (match.sum(-1) != 1).nonzero().tolist():
        (row, pair), axes = unmatched[0], target.axes
        turn = ", ".join(f"{x:.4g} on {a}" for x, a in zip(new[row, pair].tolist(), axes, strict=False))
        raise ValueError(
            f"no reordering of channels exists: {len(unmatched)} pairs of the target have no partner in the "
            f"source, such as pair {pair}, of frequencies {turn}; axes need the same frequencies in both"
        )
    channels = torch.empty(len(old), head_dim, dtype=torch.long)
    channels[:, new_channels.flatten()] = old_channels[match.int().argmax(-1)].flatten(1)
    return channels


def permute_rows(
    name: str,
    rows: Tensor,
    source: Tensor,
    order: Callable[[int, int], list[HeadIndex]] = heads_only,
    kv_heads: int | None = None,
) -> Tensor:
    """Rows (h * d, ...) with the channels of each head reordered; heads lie in the `order` of a fused weight.

    Raises:
        ValueError: rows that head_dim does not divide, or heads that Omega or the key heads do not fit.
    """
    source = source[:1] if (source == source[:1]).all() else source
    n, d = source.shape
    count, rest = divmod(len(rows), d)
    if rest or not count:
        raise ValueError(
            f"{name} has {len(rows)} rows, which head_dim {d} does not divide; give the model's own"
        )
    places = order(count, kv_heads or count // 3)
    if len(places) != count:
        raise ValueError(f"{name} has {count} heads, which do not lie in the order {order.__name__!r}")
    if any(place and place[1] % n for place in places):
        raise ValueError(
            f"{name} has {count} heads, but Omega has {n} rows that differ, which must divide them"
        )
    still = torch.arange(d)
    heads = [still if place is None else source[place[0] * n // place[1]] for place in places]
    index = torch.stack(heads) + d * torch.arange(count)[:, None]
    return rows[index.flatten().to(rows.device)]
