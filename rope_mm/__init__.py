"""Unified rotary position encodings for text, images and videos."""

from rope_mm.check import RotaryReport as RotaryReport
from rope_mm.check import check_rotary as check_rotary
from rope_mm.kernels import rotate as rotate
from rope_mm.lattice import Cursor as Cursor
from rope_mm.layouts import LAYOUTS as LAYOUTS
from rope_mm.positions import augment as augment
from rope_mm.positions import pack as pack
from rope_mm.positions import place as place
from rope_mm.positions import place_rows as place_rows
from rope_mm.properties import Promises as Promises
from rope_mm.properties import promise_table as promise_table
from rope_mm.properties import promises as promises
from rope_mm.rotary import Rotary as Rotary
from rope_mm.scheme import Scheme as Scheme
from rope_mm.schemes import SCHEMES as SCHEMES
from rope_mm.segments import Audio as Audio
from rope_mm.segments import Frames as Frames
from rope_mm.segments import Image as Image
from rope_mm.segments import Segment as Segment
from rope_mm.segments import Sound as Sound
from rope_mm.segments import Still as Still
from rope_mm.segments import Text as Text
from rope_mm.segments import Video as Video
from rope_mm.segments import film as film
from rope_mm.segments import parse_segments as parse_segments
