"""Patches of several frames, and videos whose frames see each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm import Image, Text, Video
from rope_mm.models import (
    ImageBatcher,
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    load_tokenizer,
    read_config,
)
from rope_mm.nn.attention import make_block_ids
from rope_mm.nn.patches import from_tubelets, to_tubelets

VIDEO = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(**settings):
    torch.manual_seed(0)
    config = read_config(hidden_size=32, intermediate_size=48, **settings)
    processor = RopeMMProcessor.from_config(config, load_tokenizer())
    return processor, RopeMMForConditionalGeneration(config).eval()


def seed(number=0):
    return torch.Generator().manual_seed(number)


@given(frames=st.integers(1, 7), depth=st.integers(1, 4))
def test_tubelets_hold_every_frame_in_order_and_then_repeat_the_last(frames, depth):
    video = torch.rand(frames, 2, 3, 5)
    tubes = to_tubelets(video, depth)
    assert tubes.shape == (-(-frames // depth), depth * 2, 3, 5)
    back = from_tubelets(tubes[None], depth)[0]
    assert torch.equal(back[:frames], video)
    assert all(torch.equal(frame, video[-1]) for frame in back[frames:])


def test_a_patch_of_two_frames_is_one_token_for_twice_the_time():
    processor, model = make(temporal_patch_size=2)
    sequence, (shown,) = processor.split_document(["a", VIDEO], seconds=0.5)
    assert sequence[1] == Video(2, 2, 2, 1.0) and shown.shape == (8, 8)
    first = torch.cat([VIDEO[frame, :, :2, :2].flatten() for frame in (0, 1)])
    assert torch.equal(shown[0], first)
    image, (patches,) = processor.split_document([VIDEO[0]])
    assert image == [Image(2, 2)] and torch.equal(patches[:, :4], patches[:, 4:])
    inputs = processor(documents=[["a", VIDEO, VIDEO[0]]])
    assert model(**inputs).patches.shape == (12, 8)


def test_videos_of_any_length_and_images_are_generated_in_patches_of_two_frames():
    processor, model = make(temporal_patch_size=2)
    videos = processor.generate_images(model, ["a", "bc"], Video(5, 2, 2), seed())
    assert videos.shape == (2, 5, 1, 4, 4)
    whole = processor.generate_images(model, ["a", "bc"], Video(6, 2, 2), seed())
    torch.testing.assert_close(whole[:, :4], videos[:, :4], rtol=1e-4, atol=1e-5)
    assert processor.generate_images(model, ["a"], Image(2, 2), seed()).shape == (1, 1, 4, 4)
    on = processor.generate_images(model, ["a"], Video(6, 2, 2), seed(), context=[VIDEO])
    assert on.shape == (1, 6, 1, 4, 4) and torch.equal(on[0, :4], VIDEO)
    with pytest.raises(ValueError, match="a video of 3 frames ends within a patch of 2"):
        processor.generate_images(model, ["a"], Video(6, 2, 2), context=[VIDEO[:3]])


def test_frames_see_later_ones_if_and_only_if_attention_is_full():
    changed = VIDEO.clone()
    changed[-1] += 1
    for attention, seen in (("causal", False), ("full", True)):
        processor, model = make(video_attention=attention)
        outs = [
            model(**processor(documents=[["ab", video, "c"]])).last_hidden_state for video in (VIDEO, changed)
        ]
        words, first, last = (outs[0] != outs[1])[0].any(-1).split([2, 12, 5])
        assert not words.any() and first.any() == seen and last.all()


def test_a_video_with_full_attention_is_one_block():
    sequence = [Text(2), Video(3, 1, 2), Text(1), Image(1, 2)]
    assert make_block_ids(sequence, full_video=True).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 5]
    assert make_block_ids(sequence).tolist() == [1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7]


def test_a_video_with_full_attention_takes_one_pass_and_has_no_context_or_window():
    processor, model = make(video_attention="full")
    videos = processor.generate_images(model, ["a"], Video(3, 2, 2), seed())
    inputs = processor(documents=[["a", torch.zeros(3, 1, 4, 4)]])
    noise = torch.randn(1, 3, 4, 4, generator=seed()).view(12, 4)
    made = model(**inputs | {"patches": noise}).patches
    assert torch.allclose(processor.encode_visual(videos[0], 1.0)[1], made, atol=1e-5)
    for options in ({"context": [VIDEO]}, {"window_frames": 2}):
        with pytest.raises(ValueError, match="frames see each other here, so a video is generated whole"):
            processor.generate_images(model, ["a"], Video(6, 2, 2), seed(), **options)


def test_both_settings_are_saved_with_model_and_processor(tmp_path):
    processor, model = make(temporal_patch_size=2, video_attention="full")
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = RopeMMProcessor.from_pretrained(tmp_path)
    assert (loaded.temporal_patch_size, loaded.video_attention) == (2, "full")
    assert (
        RopeMMForConditionalGeneration.from_pretrained(tmp_path).config.patch_width == loaded.patch_width == 8
    )


def test_wrong_settings_of_videos_are_refused():
    with pytest.raises(ValueError, match="video_attention must be one of causal, full, not 'both'"):
        read_config(video_attention="both")
    with pytest.raises(ValueError, match="temporal_patch_size must be at least 1, not 0"):
        read_config(temporal_patch_size=0)
    with pytest.raises(ValueError, match="temporal_patch_size 2 is for videos; images alone take 1"):
        _ = ImageBatcher(read_config(temporal_patch_size=2), load_tokenizer(), 8).grid
