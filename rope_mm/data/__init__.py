"""Captioned images: digits of our own, or anything that `datasets` loads; and documents made of them."""

from rope_mm.data.digits import DIGIT_NAMES as DIGIT_NAMES
from rope_mm.data.digits import PHRASES as PHRASES
from rope_mm.data.digits import captioned_digits as captioned_digits
from rope_mm.data.documents import Documents as Documents
from rope_mm.data.images import CaptionedImages as CaptionedImages
from rope_mm.data.images import load_images as load_images
from rope_mm.data.images import load_splits as load_splits
from rope_mm.data.order import batch_indices as batch_indices
from rope_mm.data.order import seeded as seeded
