"""Rotary schemes in the models of transformers: set by one line, reverted by one line.

- `set_rope(model, "rope-tv")` lets a live model rotate by a scheme and returns a `Handle`; `handle.undo()` or
  `unset_rope(model)` gives the model its own rotary back.
- `rope_of(model)` reads what a model rotates by, as a `ModelRope`; `explain(model)` prints it for every part.
- `positions_for(model, inputs)` makes the `position_ids` of text, images and videos by the model's scheme;
  `position_ids_of(positions)` those of positions that were placed without a model.
- `PackingCollator(processor, model, max_length)` packs examples of text and images for Trainer;
  `packed_equals_alone(model, examples, collator)` checks any collator.
- `use_kernels(model)` rotates queries and keys by this library's kernels.
"""

from typing import TYPE_CHECKING, Any

from rope_mm.checks.extras import import_name

if TYPE_CHECKING:
    from rope_mm.hf.packing.check import PackingReport, packed_equals_alone
    from rope_mm.hf.packing.collator import PackingCollator
    from rope_mm.hf.patching import Handle, explain, rope_of, set_rope, unset_rope, use_kernels
    from rope_mm.hf.position_ids import position_ids_of, positions_for
    from rope_mm.hf.rotary_inspection import ModelRope

__all__ = [
    "Handle",
    "ModelRope",
    "PackingCollator",
    "PackingReport",
    "explain",
    "packed_equals_alone",
    "position_ids_of",
    "positions_for",
    "rope_of",
    "set_rope",
    "unset_rope",
    "use_kernels",
]

HOMES = {
    "Handle": "patching",
    "ModelRope": "rotary_inspection",
    "PackingCollator": "packing.collator",
    "PackingReport": "packing.check",
    "explain": "patching",
    "packed_equals_alone": "packing.check",
    "position_ids_of": "position_ids",
    "positions_for": "position_ids",
    "rope_of": "patching",
    "set_rope": "patching",
    "unset_rope": "patching",
    "use_kernels": "patching",
}


def __getattr__(
    name: str,
) -> Any:  # so that the core, which reads configs by this package, needs no transformers
    return import_name(__name__, HOMES, name, "hf")
