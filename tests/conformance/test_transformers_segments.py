"""Positions of sequences: transformers' own get_rope_index against our layouts."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rope_mm.positions.place import place, place_rows
from rope_mm.segments import Audio, Image, MoreFrames, Segment, Text, Video, VideoAudio, interleave_audio

few = settings(max_examples=15, deadline=None)
sizes = st.integers(1, 5)
images = st.builds(Image, sizes, sizes)
short_videos = st.builds(
    lambda y, x, t: Video(min(t, y, x), y, x), sizes, sizes, sizes
)  # no longer than wide
videos = st.builds(Video, st.integers(1, 30), sizes, sizes)


def with_text(media) -> st.SearchStrategy[list[Segment]]:
    """Media with text before, between and after."""
    pairs = st.lists(st.tuples(st.builds(Text, sizes), media), min_size=1, max_size=4)
    return st.builds(
        lambda segments, last: [x for pair in segments for x in pair] + [last], pairs, st.builds(Text, sizes)
    )


def bare(kind, **changes):
    """A model of its default configuration, without weights."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = kind.config_class()
    for name, value in changes.items():
        setattr(model.config.vision_config, name, value)
    return model


def grids(segments: list[Segment], kind: type, merge=(1, 2, 2)) -> Tensor | None:
    """Patches along t, y, x of the segments' images or videos, before they are merged."""
    rows = [[n * m for n, m in zip(x.grid, merge, strict=True)] for x in segments if type(x) is kind]
    return torch.tensor(rows) if rows else None


def types(segments: list[Segment]) -> Tensor:
    """0 for text, 1 for images, 2 for videos, (1, s)."""
    number = {Text: 0, Image: 1, Video: 2}
    return torch.tensor([[number[type(x)] for x in segments for _ in range(x.tokens)]])


def ids_of(model, segments: list[Segment], frames: int = 1, **more) -> tuple[Tensor, float]:
    """Positions (s, 3) and the first one decoded, as the model has them."""
    kinds = types(segments)
    positions, delta = model.get_rope_index(
        kinds, kinds, grids(segments, Image), grids(segments, Video, (frames, 2, 2)), **more
    )
    return positions[:, 0].T, delta.item() + kinds.shape[1]


MERGED = {
    "Qwen2VLModel": 1,
    "Qwen2_5_VLModel": 1,
    "Ernie4_5_VLMoeModel": 2,  # frames in pairs
}
SPLIT = ["Qwen3VLModel", "Qwen3_5Model", "Glm4vModel"]
SCHEME = {"Ernie4_5_VLMoeModel": "m-rope-ernie-4.5-vl", "Glm4vModel": "m-rope-glm-4.1v"}
SCHEME |= {
    "Qwen2VLModel": "m-rope-qwen2-vl",
    "Qwen3VLModel": "m-rope-qwen3-vl",
    "Qwen3_5Model": "m-rope-qwen3.5",
}


@pytest.mark.parametrize("name", ["Qwen2VLModel", "Ernie4_5_VLMoeModel"])
@few
@given(segments=with_text(images | short_videos))
def test_images_and_short_videos_stand_as_in(name, agree, segments):
    theirs, decoded = ids_of(bare(getattr(transformers, name)), segments, MERGED[name])
    ours, cursor = place(segments, "m-rope")
    agree(SCHEME[name], f"transformers {name}.get_rope_index", ours, theirs, 0, "positions")
    assert cursor.next == decoded


@pytest.mark.parametrize("name", ["Qwen2VLModel", "Ernie4_5_VLMoeModel"])
@few
@given(segments=with_text(images | videos))
def test_the_layout_m_rope_hf_is_what_transformers_does(name, agree, segments):
    theirs, _ = ids_of(bare(getattr(transformers, name)), segments, MERGED[name])
    ours, _ = place(segments, "m-rope-hf")
    agree("m-rope-hf", f"transformers {name}.get_rope_index", ours, theirs, 0, "positions")


@pytest.mark.parametrize("name", SPLIT)
@few
@given(segments=with_text(images | short_videos), stamp=sizes)
def test_videos_given_frame_by_frame_stand_as_in(name, agree, segments, stamp):
    frames = []
    for seen in segments:
        still = Video(1, *seen.grid[1:])
        frames += [still, Text(stamp)] * seen.t if isinstance(seen, Video) else [seen]
    kinds = types(frames)
    model = bare(getattr(transformers, name))
    positions, delta = model.get_rope_index(kinds, kinds, grids(segments, Image), grids(segments, Video))
    ours, cursor = place(frames, "m-rope")
    original = f"transformers {name}.get_rope_index"
    agree(SCHEME[name], original, ours, positions[:, 0].T, 0, "positions")
    assert cursor.next == delta.item() + kinds.shape[1]


@few
@given(
    segments=with_text(images),
    seen=st.builds(Video, st.integers(1, 20), sizes, sizes, st.sampled_from((0.25, 0.5, 1.0, 1.5, 2.0))),
    rate=st.sampled_from((2, 4)),
)
def test_frames_stand_at_their_seconds_as_in_qwen_2_5_vl(agree, segments, seen, rate):
    segments = [*segments, seen]
    model = bare(transformers.Qwen2_5_VLModel, tokens_per_second=rate)
    theirs, decoded = ids_of(model, segments, second_per_grid_ts=[seen.seconds_per_frame])
    ours, cursor = place(segments, "m-rope-time", rate=float(rate))
    original = "transformers Qwen2_5_VLModel.get_rope_index"
    agree("m-rope-qwen2.5-vl", original, ours, theirs, 0, "positions")
    assert cursor.next == decoded


@pytest.mark.parametrize("fps", [1, 2, 5, 10, 15, 24, 30, 60])
def test_a_long_video_of_a_usual_frame_rate_stands_as_in_qwen_2_5_vl(agree, fps):
    segments = [Text(1), Video(200, 1, 1, 2 / fps)]  # of frames in pairs
    model = bare(transformers.Qwen2_5_VLModel, tokens_per_second=2)
    theirs, _ = ids_of(model, segments, second_per_grid_ts=torch.tensor([2 / fps]))
    ours, _ = place(segments, "m-rope-time")
    agree("m-rope-qwen2.5-vl", "transformers Qwen2_5_VLModel.get_rope_index", ours, theirs, 0, "positions")
    assert (ours[1:, 0] - 1).tolist() == [4 * frame // fps for frame in range(200)]


@few
@given(
    sequences=st.lists(with_text(images | short_videos), min_size=2, max_size=3),
    side=st.sampled_from(("left", "right")),
)
def test_padded_rows_stand_as_in_qwen2_vl(agree, sequences, side):
    rows = place_rows(sequences, "m-rope", padding_side=side)
    kinds = torch.zeros(rows.mask.shape, dtype=torch.long)
    kinds[rows.mask] = torch.cat([types(segments)[0] for segments in sequences])
    whole = [seen for segments in sequences for seen in segments]
    theirs, _ = bare(transformers.Qwen2VLModel).get_rope_index(
        kinds, kinds, grids(whole, Image), grids(whole, Video), attention_mask=rows.mask.long()
    )
    original = "transformers Qwen2VLModel.get_rope_index"
    agree("m-rope-qwen2-vl", original, rows.positions, theirs.permute(1, 2, 0), 0, "positions")


# --- Qwen2.5-Omni: media stand between a word of beginning and one of end ----------------------------------

OMNI = "transformers Qwen2_5OmniThinkerModel.get_rope_index"
WORD, BEGIN, HEAR, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3, 4, 5
TOKEN = {Text: WORD, Image: IMAGE, Video: VIDEO, MoreFrames: VIDEO, Audio: AUDIO, VideoAudio: AUDIO}


def omni():
    """Its thinker, without weights, with small token numbers."""
    model = bare(transformers.Qwen2_5OmniThinkerModel)
    model.spatial_merge_size = 2
    names = ("vision_start", "audio_start", "image", "video", "audio")
    for number, name in enumerate(names, start=1):
        setattr(model.config, f"{name}_token_id", number)
    return model


def omni_ids(segments: list[Segment], ids: list[int], audio: list[int], **more) -> Tensor:
    """Positions (s, 3) of the tokens `ids`, with as many tokens of sound as `audio` says."""
    short_videos = [seen for seen in segments if type(seen) is Video]
    positions, _ = omni().get_rope_index(
        torch.tensor([ids]),
        grids(segments, Image),
        grids(segments, Video),
        torch.ones(1, len(ids), dtype=torch.long),
        audio_seqlens=torch.tensor([4 * n for n in audio]),  # frames of 10 ms
        second_per_grids=torch.tensor([seen.seconds_per_frame for seen in short_videos]),
        **more,
    )
    return positions[:, 0].T


seconds = st.sampled_from((0.25, 0.5, 1.0, 2.0))
shown = st.builds(Video, sizes, sizes, sizes, seconds) | images | st.builds(Audio, st.integers(1, 99))


@few
@given(media=st.lists(shown, max_size=3), last=images, words=st.integers(0, 4))
def test_sights_and_sounds_stand_as_in_qwen_2_5_omni(agree, media, last, words):
    segments, ids = [], []
    for seen in [*media, last]:
        segments += [*[Text(1)] * words, Text(1), seen, Text(1)]
        begin = HEAR if isinstance(seen, Audio) else BEGIN
        ids += [*[WORD] * words, begin, *[TOKEN[type(seen)]] * seen.tokens, WORD]
    theirs = omni_ids(segments, ids, [x.length for x in segments if isinstance(x, Audio)])
    ours, _ = place(segments, "tm-rope")
    agree("tm-rope", OMNI, ours, theirs, 0, "positions")


def film_ids(seen: Video, sound: int, words: int) -> tuple[Tensor, Tensor]:
    """Positions of words, a film and three words, ours and theirs.

    They begin and end a film by two tokens each, that share a position: one of them is left out here.
    """
    chunks = interleave_audio(seen, sound)
    segments = [Text(words + 1), *chunks, Text(3)]
    inner = [TOKEN[type(x)] for x in chunks for _ in range(x.tokens)]
    ids = [*[WORD] * words, BEGIN, HEAR, *inner, WORD, WORD, WORD, WORD]
    theirs = omni_ids([seen], ids, [sound], use_audio_in_video=True)
    second, end = words + 1, words + 2 + len(inner)
    assert torch.equal(theirs[second], theirs[second - 1]) and torch.equal(theirs[end], theirs[end + 1])
    kept = [row for row in range(len(ids)) if row not in (second, end)]
    return place(segments, "tm-rope")[0], theirs[kept]


@few
@given(
    seen=st.builds(Video, st.integers(1, 9), sizes, sizes, seconds),
    words=st.integers(1, 4),
    longer=st.integers(1, 120),
)
def test_a_video_whose_sound_ends_last_stands_as_in_qwen_2_5_omni(agree, seen, words, longer):
    sound = max(int((seen.t - 1) * seen.seconds_per_frame * 25), seen.y, seen.x) + longer
    ours, theirs = film_ids(seen, sound, words)
    agree("tm-rope", f"{OMNI} (use_audio_in_video)", ours, theirs, 0, "positions")


@few
@given(seen=st.builds(Video, st.integers(10, 20), sizes, sizes, seconds), words=st.integers(1, 4))
def test_a_video_that_goes_on_in_silence_stands_as_in_qwen_2_5_omni(agree, seen, words):
    whole_chunks = int((seen.t - 1) * seen.seconds_per_frame / 2)
    sound = 50 * whole_chunks - 25
    ours, theirs = film_ids(seen, sound, words)
    agree("tm-rope", f"{OMNI} (use_audio_in_video)", ours, theirs, 0, "positions")


def test_divergence_tokens_after_a_video_whose_frames_end_last_stand_before_its_end_in_transformers():
    # 1 s of sound beside frames up to 1.5 s, in one chunk: words follow the last token, which is sound
    ours, theirs = film_ids(Video(4, 2, 2, 0.5), 25, 1)
    assert torch.equal(ours[:-3], theirs[:-3])
    assert theirs[-3, 0] == 2 + 25 and ours[-3, 0] == 2 + 38  # 1.5 s is 37 of 25 a second


def test_divergence_sound_is_not_beside_its_frames_in_transformers_where_frames_are_over_2_s_apart():
    # a chunk of theirs is a frame of the list, so the second one, at 5 s, goes with the sound of 2 to 4 s
    ours, theirs = film_ids(Video(2, 1, 1, 5.0), 150, 1)
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours.sort(0).values, theirs.double().sort(0).values)


def test_divergence_frames_at_25_a_second_are_rounded_below_their_position_in_transformers():
    # 0.08 s in fp32 is a bit less, so that its k-th multiple, 25 a second, is often below 2 k
    seen = Video(200, 1, 1, 2 / 25)
    theirs = omni_ids([seen], [BEGIN, *[VIDEO] * 200, WORD], [])[:-1]
    ours, _ = place([Text(1), seen], "tm-rope")
    assert ours[1:, 0].tolist() == [1 + 2 * frame for frame in range(200)]
    assert (ours - theirs).sum(0).tolist() == [43, 0, 0]


# --- where transformers leaves the released M-RoPE ---------------------------------------------------------


@pytest.mark.parametrize("name", MERGED)
def test_divergence_tokens_after_a_long_video_stand_inside_it_in_transformers(name):
    # as released, words stand past the largest position on all axes; there, past rows and columns only
    segments = [Text(3), Video(20, 2, 3), Text(4)]
    theirs, decoded = ids_of(bare(getattr(transformers, name), tokens_per_second=1), segments, MERGED[name])
    ours, cursor = place(segments, "m-rope")
    assert torch.equal(ours[:-4], theirs[:-4].double())
    assert ours[-4:, 0].tolist() == [23, 24, 25, 26] and theirs[-4:, 0].tolist() == [6, 7, 8, 9]
    assert (
        theirs[:-4].max() == 22 and decoded == 23 and cursor.next == 27
    )  # the first one decoded jumps there


@pytest.mark.parametrize("name", [*MERGED, *SPLIT])
def test_divergence_adjacent_images_cannot_be_placed_by_transformers(name):
    segments = [Text(2), Image(2, 3), Image(3, 2), Text(2)]
    with pytest.raises(RuntimeError, match="existing size"):
        ids_of(bare(getattr(transformers, name)), segments)
    assert len(place(segments, "m-rope")[0]) == 16
