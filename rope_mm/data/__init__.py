"""Captioned images: digits that come with the library, or anything that `datasets` loads."""

from rope_mm.data.augment import AUGMENTATIONS as AUGMENTATIONS
from rope_mm.data.augment import draw_augmentation as draw_augmentation
from rope_mm.data.digits import DIGIT_NAMES as DIGIT_NAMES
from rope_mm.data.digits import PHRASES as PHRASES
from rope_mm.data.digits import captioned_digits as captioned_digits
from rope_mm.data.images import CaptionedImages as CaptionedImages
from rope_mm.data.images import load_images as load_images
from rope_mm.data.order import batch_indices as batch_indices
from rope_mm.data.order import seeded as seeded
