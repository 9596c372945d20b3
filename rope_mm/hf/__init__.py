"""Rotary schemes in the models of transformers: in by one line, out by one line, never silently."""

from rope_mm.hf.inspection import ModelRope as ModelRope
from rope_mm.hf.patching import Handle as Handle
from rope_mm.hf.patching import explain as explain
from rope_mm.hf.patching import rope_of as rope_of
from rope_mm.hf.patching import set_rope as set_rope
from rope_mm.hf.patching import unset_rope as unset_rope
from rope_mm.hf.patching import use_kernels as use_kernels
from rope_mm.hf.position_ids import positions_for as positions_for
