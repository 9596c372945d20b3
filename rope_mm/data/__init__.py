"""Captioned images and clips: digits and sprites of its own, or anything that `datasets` loads."""

from rope_mm.data.captioned_sprites import CLIP_PHRASES as CLIP_PHRASES
from rope_mm.data.captioned_sprites import SPRITE_PHRASES as SPRITE_PHRASES
from rope_mm.data.captioned_sprites import captioned_clips as captioned_clips
from rope_mm.data.captioned_sprites import captioned_sprites as captioned_sprites
from rope_mm.data.captioned_sprites import is_held_out as is_held_out
from rope_mm.data.captioned_sprites import read_caption as read_caption
from rope_mm.data.digits import DIGIT_NAMES as DIGIT_NAMES
from rope_mm.data.digits import PHRASES as PHRASES
from rope_mm.data.digits import captioned_digits as captioned_digits
from rope_mm.data.images import EMBEDDED as EMBEDDED
from rope_mm.data.images import CaptionedImages as CaptionedImages
from rope_mm.data.images import load_images as load_images
from rope_mm.data.images import load_splits as load_splits
from rope_mm.data.order import batch_indices as batch_indices
from rope_mm.data.order import seeded as seeded
from rope_mm.data.places import Quiz as Quiz
from rope_mm.data.places import ask_cell as ask_cell
from rope_mm.data.places import ask_frame as ask_frame
from rope_mm.data.places import ask_neighbour as ask_neighbour
from rope_mm.data.sprite_judge import judge_clips as judge_clips
from rope_mm.data.sprite_judge import judge_sprites as judge_sprites
from rope_mm.data.sprites import CLIP_FACTORS as CLIP_FACTORS
from rope_mm.data.sprites import FACTORS as FACTORS
from rope_mm.data.sprites import draw_clips as draw_clips
from rope_mm.data.sprites import draw_sprites as draw_sprites
