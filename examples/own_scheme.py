"""A scheme of one's own: a layout is a function and an entry, and every tool takes the scheme from there.

    python examples/own_scheme.py    # seconds on one core, nothing is downloaded

Here pictures are read like pages one below the other: rows go on along the first axis, columns along the
second, which has half as many channels.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rope_mm import Rotary, Scheme, check_rotary, place
from rope_mm.hf import positions_for, set_rope
from rope_mm.positions.grids import Cursor, grid_positions
from rope_mm.positions.layouts import LAYOUTS, Layout
from rope_mm.segments import Segment

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def page(at: Cursor, seen: Segment) -> tuple[torch.Tensor, float]:
    """Positions (t*y*x, 2) of a picture that starts at the next row, and where the next word stands."""
    t, y, x = seen.grid
    rows_and_columns = ((y, 0), (1, 0), (0, 1))  # what a step of t, of y and of x adds
    return grid_positions((t, y, x), (at.next, at.next), rows_and_columns), at.next + max(t * y, x)


def main() -> None:
    """Enter it, look at it, check it and let Llama run it."""
    LAYOUTS["page"] = Layout(("y", "x"), page, "examples/own_scheme.py")
    mine = Scheme(layout="page", ownership="chunk", shares=(2, 1))

    positions, _ = place("text:2 image:2x3 text:1", "page")
    print(positions.T)
    print(mine.omega(12))  # radians per step, axes x pairs
    assert check_rotary(Rotary(12, mine)).ok  # a rotation, of differences of positions alone

    llama: Any = LlamaForCausalLM(LlamaConfig(vocab_size=99, **SIZES)).eval()
    set_rope(llama, mine)
    where = positions_for(llama, ["text:2 image:2x3 text:4"])
    ids = torch.randint(3, 99, (1, 12))
    out = llama.generate(input_ids=ids, position_ids=where, max_new_tokens=4, do_sample=False)
    print(f"{out.shape[1] - 12} words after a page")


if __name__ == "__main__":
    main()
