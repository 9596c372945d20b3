"""Unified rotary position encodings for text, images and videos."""

from rope_mm.convert import convert_pairing as convert_pairing
from rope_mm.kernels import rotate as rotate
from rope_mm.lattice import Cursor as Cursor
from rope_mm.layouts import LAYOUTS as LAYOUTS
from rope_mm.positions import place as place
from rope_mm.rope_parameters import from_hf_config as from_hf_config
from rope_mm.rope_parameters import to_rope_parameters as to_rope_parameters
from rope_mm.rotary import Rotary as Rotary
from rope_mm.scheme import Scheme as Scheme
from rope_mm.schemes import SCHEMES as SCHEMES
from rope_mm.segments import Image as Image
from rope_mm.segments import Segment as Segment
from rope_mm.segments import Text as Text
from rope_mm.segments import Video as Video
from rope_mm.segments import parse_segments as parse_segments
