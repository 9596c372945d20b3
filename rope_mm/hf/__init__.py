"""Rotary schemes in the models of transformers: in by one line, out by one line, never silently."""

from rope_mm.hf.placing import positions_for as positions_for
from rope_mm.hf.reading import ModelRope as ModelRope
from rope_mm.hf.swap import Handle as Handle
from rope_mm.hf.swap import explain as explain
from rope_mm.hf.swap import rope_of as rope_of
from rope_mm.hf.swap import set_rope as set_rope
from rope_mm.hf.swap import unset_rope as unset_rope
from rope_mm.hf.swap import use_kernels as use_kernels
