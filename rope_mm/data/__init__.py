"""Captioned images and videos, embedded or anything that `datasets` loads, and documents made of them."""

from rope_mm.checks.extras import extra

with extra("train"):
    from rope_mm.data.augmentation import AUGMENTATIONS as AUGMENTATIONS
    from rope_mm.data.augmentation import draw_augmentation as draw_augmentation
    from rope_mm.data.documents import MapDocuments as MapDocuments
    from rope_mm.data.images import EMBEDDED as EMBEDDED
    from rope_mm.data.images import CaptionedImages as CaptionedImages
    from rope_mm.data.images import load_images as load_images
    from rope_mm.data.images import load_splits as load_splits
    from rope_mm.data.images import select_rows as select_rows
    from rope_mm.data.seeding import ShuffledOrder as ShuffledOrder
    from rope_mm.data.seeding import batch_indices as batch_indices
    from rope_mm.data.seeding import make_generator as make_generator
    from rope_mm.data.streaming import StreamingDocuments as StreamingDocuments
    from rope_mm.data.streaming import load_documents as load_documents
    from rope_mm.data.synthetic.captioned_sprites import SPRITE_PHRASES as SPRITE_PHRASES
    from rope_mm.data.synthetic.captioned_sprites import VIDEO_PHRASES as VIDEO_PHRASES
    from rope_mm.data.synthetic.captioned_sprites import captioned_sprites as captioned_sprites
    from rope_mm.data.synthetic.captioned_sprites import captioned_videos as captioned_videos
    from rope_mm.data.synthetic.captioned_sprites import is_held_out as is_held_out
    from rope_mm.data.synthetic.captioned_sprites import read_caption as read_caption
    from rope_mm.data.synthetic.digits import DIGIT_NAMES as DIGIT_NAMES
    from rope_mm.data.synthetic.digits import PHRASES as PHRASES
    from rope_mm.data.synthetic.digits import captioned_digits as captioned_digits
    from rope_mm.data.synthetic.letters import captioned_letters as captioned_letters
    from rope_mm.data.synthetic.letters import is_held_out_letter as is_held_out_letter
    from rope_mm.data.synthetic.qa_tasks import QASample as QASample
    from rope_mm.data.synthetic.qa_tasks import make_cell as make_cell
    from rope_mm.data.synthetic.qa_tasks import make_frame as make_frame
    from rope_mm.data.synthetic.qa_tasks import make_neighbour as make_neighbour
    from rope_mm.data.synthetic.sprites import FACTORS as FACTORS
    from rope_mm.data.synthetic.sprites import VIDEO_FACTORS as VIDEO_FACTORS
    from rope_mm.data.synthetic.sprites import render_sprites as render_sprites
    from rope_mm.data.synthetic.sprites import render_videos as render_videos
    from rope_mm.data.synthetic.stacked import stack_digits as stack_digits
    from rope_mm.data.synthetic.stacked import stacked_digits as stacked_digits
    from rope_mm.data.videos import CaptionedVideos as CaptionedVideos
    from rope_mm.data.videos import load_videos as load_videos

__all__ = [
    "AUGMENTATIONS",
    "DIGIT_NAMES",
    "EMBEDDED",
    "FACTORS",
    "PHRASES",
    "SPRITE_PHRASES",
    "VIDEO_FACTORS",
    "VIDEO_PHRASES",
    "CaptionedImages",
    "CaptionedVideos",
    "MapDocuments",
    "QASample",
    "StreamingDocuments",
    "batch_indices",
    "captioned_digits",
    "captioned_letters",
    "captioned_sprites",
    "captioned_videos",
    "draw_augmentation",
    "is_held_out",
    "is_held_out_letter",
    "load_documents",
    "load_images",
    "load_splits",
    "load_videos",
    "make_cell",
    "make_frame",
    "make_generator",
    "make_neighbour",
    "read_caption",
    "render_sprites",
    "render_videos",
    "select_rows",
    "stack_digits",
    "stacked_digits",
]
