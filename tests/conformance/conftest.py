"""Originals run beside ours: what agrees is collected, and the table of docs/conformance.md is made of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from rope_mm import Rotary
from rope_mm.analysis import markdown

HEADS = 2
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

ROWS: dict[tuple[str, str, str], float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write the table of docs/conformance.md")


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """`agree("qwen-image", "diffusers QwenEmbedRope", ours, theirs, 1e-6)`: no element differs by more."""

    def agree(
        scheme: str, original: str, ours: Tensor, theirs: Tensor, within: float, what: str = ""
    ) -> None:
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        error = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
        assert error <= within, f"{original} differs from {scheme} by {error:.1e}, allowed {within:.0e}"
        key = scheme, original, what
        ROWS[key] = max(error, ROWS.get(key, 0.0))

    return agree


@pytest.fixture
def compared() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Scheme, original and what was compared: the rows that the page has, and those of this run."""
    return {tuple(row[:3]) for row in markdown.read_table(PAGE, "originals")}, set(ROWS)


class Attention(Exception):
    """Raised instead of attention, with the q and k that it was given."""


def attended(processor, q, k, words=0, words_last=False, streams=False, parts=None, **inputs):
    """q and k (b, s, h, d) as a processor of diffusers hands them to attention, the first `words` as text.

    The processor runs up to its call of attention, so that the pairing of channels and which tokens are
    rotated is the original's, too. Some put the words last, and some have projections of their own for them:
    `streams`. `parts` are further attributes of the attention module.
    """
    h, d = q.shape[2:]

    def same(x):
        return x

    def take_q(x):
        return x[..., : h * d]

    def take_k(x):
        return x[..., h * d :]

    def stop(query=None, key=None, *_, **__):
        raise Attention(query, key)

    attn = SimpleNamespace(
        heads=h, head_dim=d, inner_dim=h * d, scale=1.0, to_q=take_q, to_k=take_k, to_v=take_q,
        norm_q=same, norm_k=same, norm_added_q=same, norm_added_k=same, add_q_proj=None, add_k_proj=None,
        added_kv_proj_dim=None, fused_projections=False, is_cross_attention=False, spatial_norm=None,
        group_norm=None, num_heads=h, num_kv_heads=h, to_gate=same, to_query=take_q, to_key=take_k,
        to_value=take_q, query_norm=same, key_norm=same,
    )  # fmt: skip
    vars(attn).update(parts or {})
    if streams:
        attn.add_q_proj, attn.add_k_proj, attn.add_v_proj = take_q, take_k, take_q
    text, images = torch.cat((q.flatten(2), k.flatten(2)), -1).split((words, q.shape[1] - words), 1)
    inputs |= {"encoder_hidden_states": text} if words else {}
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with patch(attention, stop), pytest.raises(Attention) as caught:  # noqa: PT011  it carries tensors alone
        processor(attn, images, **inputs)
    theirs = torch.stack([x.transpose(1, 2) for x in caught.value.args])
    return theirs.roll(words, 2) if words_last else theirs


class Ours:
    """A scheme's rotary with the positions of segments, to be compared with originals."""

    def __init__(self, agree, scheme, head_dim, segments, **changes):
        self.agree, self.scheme, self.rope = agree, scheme, Rotary(head_dim, scheme, **changes)
        self.positions, _ = self.rope.place(segments)

    def same_positions(self, original, theirs, within=0.0):
        """Theirs (s, a), of the last s tokens."""
        ours = self.positions[-len(theirs) :]
        self.agree(self.scheme, f"diffusers {original}", ours, theirs, within, "positions")

    def same_table(self, original, theirs, within):
        """Their cosine and sine (s, d), of the last s tokens."""
        ours = torch.stack(self.rope.cos_sin(self.positions[-len(theirs[0]) :]))
        self.agree(self.scheme, f"diffusers {original}", ours, torch.stack(list(theirs)), within, "cos, sin")

    def same_turn(self, processor, within, **inputs):
        """Random q and k, rotated by ours and by an original's processor with its tables."""
        q, k = torch.randn(2, 1, len(self.positions), HEADS, self.rope.head_dim)
        theirs, ours = attended(processor, q, k, **inputs), torch.stack(self.rope(q, k, self.positions))
        self.agree(self.scheme, f"diffusers {type(processor).__name__}", ours, theirs, within, "q, k")


@pytest.fixture(scope="session")
def ours(agree):
    return partial(Ours, agree)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write-table", default=False):
        titles = "scheme", "original", "compared", "largest difference"
        rows = [(f"`{s}`", o, w, markdown.round_up(e)) for (s, o, w), e in sorted(ROWS.items())]
        markdown.write_table(PAGE, "originals", markdown.table(titles, rows))
