"""A scheme of your own: a layout is one function and one entry; then every tool knows the scheme.

    python examples/own_scheme.py    # seconds on one core, nothing is downloaded

Here images are placed like pages, one below the other: rows continue along the first axis, columns along the
second, which gets half as many channels.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rope_mm import Rotary, Scheme, check_rotary, place
from rope_mm.hf import positions_for, set_rope
from rope_mm.positions.cursor import Cursor
from rope_mm.positions.grids import Raster
from rope_mm.positions.layouts import LAYOUTS, Layout
from rope_mm.segments import Segment

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def page(cursor: Cursor, segment: Segment) -> tuple[Raster, float]:
    """Positions (t*y*x, 2) of an image that starts at the next row, and where the next text token stands."""
    t, y, x = segment.grid
    rows_and_columns = ((y, 0), (1, 0), (0, 1))  # what a step along t, y and x adds
    return Raster((t, y, x), (cursor.next, cursor.next), rows_and_columns), cursor.next + max(t * y, x)


def main() -> None:
    """Register the layout, print it, check the scheme and run a Llama with it."""
    LAYOUTS["page"] = Layout(("y", "x"), page, "examples/own_scheme.py")
    mine = Scheme(layout="page", ownership="chunk", axis_shares=(2, 1))

    positions, _ = place("text:2 image:2x3 text:1", "page")
    print(positions.T)
    print(mine.omega(12))  # radians per step, axes x pairs
    assert check_rotary(Rotary(12, mine)).ok  # it is a rotation and depends on differences of positions only

    llama: Any = LlamaForCausalLM(LlamaConfig(vocab_size=99, **SIZES)).eval()
    set_rope(llama, mine)
    position_ids = positions_for(llama, ["text:2 image:2x3 text:4"])
    ids = torch.randint(3, 99, (1, 12))
    out = llama.generate(input_ids=ids, position_ids=position_ids, max_new_tokens=4, do_sample=False)
    print(f"{out.shape[1] - 12} tokens after a page")


if __name__ == "__main__":
    main()
