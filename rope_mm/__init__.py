"""Unified rotary position encodings for text, images and videos."""

from rope_mm.analysis.check import RotaryReport, check_rotary
from rope_mm.analysis.properties import LayoutProperties, measure_properties, properties_table
from rope_mm.hf.rope_parameters import from_hf_config, to_rope_parameters
from rope_mm.hf.weight_conversion import convert_pairing
from rope_mm.positions.cursor import Cursor
from rope_mm.positions.layouts import LAYOUTS, Layout
from rope_mm.positions.packing import pack, positions_of
from rope_mm.positions.place import PlacedBatch, augment_positions, place, place_rows
from rope_mm.rotary.dispatch import rotate, rotate_, rotate_by_angles, rotate_by_table
from rope_mm.rotary.module import Rotary
from rope_mm.rotary.polar import PoPE
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import SCHEMES
from rope_mm.segments import (
    Audio,
    Image,
    MoreFrames,
    Segment,
    Text,
    Unrotated,
    Video,
    VideoAudio,
    interleave_audio,
    parse_segments,
    timestamped_frames,
)

__version__ = "0.1.0"

__all__ = [
    "LAYOUTS",
    "SCHEMES",
    "Audio",
    "Cursor",
    "Image",
    "Layout",
    "LayoutProperties",
    "MoreFrames",
    "PlacedBatch",
    "PoPE",
    "Rotary",
    "RotaryReport",
    "Scheme",
    "Segment",
    "Text",
    "Unrotated",
    "Video",
    "VideoAudio",
    "augment_positions",
    "check_rotary",
    "convert_pairing",
    "from_hf_config",
    "interleave_audio",
    "measure_properties",
    "pack",
    "parse_segments",
    "place",
    "place_rows",
    "positions_of",
    "properties_table",
    "rotate",
    "rotate_",
    "rotate_by_angles",
    "rotate_by_table",
    "timestamped_frames",
    "to_rope_parameters",
]
