"""Videos longer than those of training: a window whose keys are rotated again when they move."""

import pytest
import torch

from rope_mm import SCHEMES, Video
from rope_mm.models import (
    RopeMMForConditionalGeneration,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.models.image_generation import UnrotatedKeyCache, sample_frames

GRID = 2, 2  # patches of a frame


def make(scheme, layers=2, **rope):
    torch.manual_seed(0)
    config = read_config(
        hidden_size=96, intermediate_size=48, num_attention_heads=3, num_key_value_heads=3,
        num_hidden_layers=layers, rope_parameters={"scheme": scheme, **rope},
    )  # fmt: skip
    return RopeMMForConditionalGeneration(config).eval()


def place(model, frames):
    """Two prompts of unequal length and a video."""
    sequences = [[words, Video(frames, *GRID)] for words in ("a", "some")]
    return build_batch(sequences, load_tokenizer(), model.config.scheme, "left")


def noise_of(model, frames, start=0):
    noise = torch.randn(2, 9, 4, model.config.patch_width, generator=torch.Generator().manual_seed(1))
    return noise[:, start : start + frames]


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if not scheme.needs_length])
def test_until_it_is_full_a_window_is_an_ordinary_cache(scheme):
    model = make(scheme)
    sequences, noise = place(model, 3), noise_of(model, 3)
    whole, rolling = (sample_frames(model, sequences, noise, 2, window=window) for window in (None, 3))
    torch.testing.assert_close(rolling, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scheme", ["rope-tv-causal", "m-rope", "flat", "mixed"])
def test_in_a_full_window_a_frame_is_generated_as_if_the_video_began_there(scheme, steps):
    model, window = make(scheme, layers=1), 3  # of one layer, whose keys know their own token alone
    made = sample_frames(model, place(model, window), noise_of(model, 7), steps, window=window)
    for frame in range(window, 7):
        before = made[:, frame - window + 1 : frame].flatten(1, 2)
        alone = sample_frames(model, place(model, window), noise_of(model, 1, frame), steps, before)
        torch.testing.assert_close(made[:, frame], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_keys_that_move_up_are_rotated_to_their_new_positions():
    model, window = make("rope-tv-causal", layers=1, theta=10.0), 3
    made = sample_frames(model, place(model, window), noise_of(model, 5), window=window)
    changed = noise_of(model, 5).clone()
    changed[:, 0] += 1  # forgotten by the fourth frame, but for what the second and third made of it
    other = sample_frames(model, place(model, window), changed, window=window)
    assert not torch.equal(made[:, 1], other[:, 1])
    whole = sample_frames(model, place(model, 5), noise_of(model, 5))
    torch.testing.assert_close(made[:, :3], whole[:, :3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made[:, 3], whole[:, 3], atol=1e-3)


def test_a_full_window_keeps_its_size(monkeypatch):
    lengths, update = [], UnrotatedKeyCache.update

    def record(self, *args, **kwargs):
        k, v = update(self, *args, **kwargs)
        lengths.append(k.shape[-2])
        return k, v

    monkeypatch.setattr(UnrotatedKeyCache, "update", record)
    model = make("rope-tv-causal", layers=1)
    sample_frames(model, place(model, 3), noise_of(model, 8), window=3)
    assert lengths == [8, 12, *[16] * 6]  # a prompt of four, then one, two and three frames of four


def test_a_processor_continues_a_video_in_a_window():
    model = make("rope-tv-causal")
    processor = RopeMMProcessor.from_config(model.config, load_tokenizer())
    context = [torch.rand(4, 1, 4, 4), torch.rand(4, 1, 4, 4)]

    def generate(frames, window, context=context):
        generator = torch.Generator().manual_seed(0)
        return processor.generate_images(
            model, ["a", "b"], Video(frames, *GRID), generator, 1, context, window
        )

    videos = generate(9, 3)
    assert videos.shape == (2, 9, 1, 4, 4)
    torch.testing.assert_close(videos[:, :4], torch.stack(context))
    late = generate(9, 3, [torch.cat([1 - video[:2], video[2:]]) for video in context])
    assert torch.equal(videos[:, 4:], late[:, 4:])  # of what began only two frames are in the window
    assert torch.equal(generate(6, 6), generate(6, None))
    with pytest.raises(ValueError, match="window must be at least 2 frames"):
        generate(9, 1)
