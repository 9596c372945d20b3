"""RoPE-2D in a vision transformer that has no rotary: one line in, one line out.

    python examples/vit_rope_2d.py    # seconds on one core, nothing is downloaded

The class token in front of the patches is not rotated, and the learned position embeddings stay. The scheme
follows the grid of each image, so other sizes work if those embeddings are interpolated.
"""

from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from rope_mm.hf import explain, set_rope

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@torch.no_grad()
def main() -> None:
    """Run the model before, with RoPE-2D on two image sizes, with all angles zero, and after."""
    vit, image = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=4)).eval(), torch.rand(1, 3, 32, 32)
    before = vit(image).pooler_output

    handle = set_rope(vit, "rope-vit-axial")
    explain(vit)
    rotated = vit(image).pooler_output
    print(f"RoPE-2D changes the output by {(rotated - before).abs().max():.1e}")
    wide = vit(torch.rand(1, 3, 32, 48), interpolate_pos_encoding=True).last_hidden_state
    print(f"an image of 8 x 12 patches: {wide.shape[1]} tokens")
    handle.undo()

    handle = set_rope(vit, "rope-vit-axial", freq_scale=0.0)  # all angles zero
    assert torch.equal(vit(image).pooler_output, before)
    handle.undo()
    assert torch.equal(vit(image).pooler_output, before)
    print("undone: the output is the same as before, bit for bit")


if __name__ == "__main__":
    main()
