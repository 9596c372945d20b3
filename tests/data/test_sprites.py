from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.data import (
    EMBEDDED,
    FACTORS,
    SPRITE_PHRASES,
    VIDEO_FACTORS,
    VIDEO_PHRASES,
    CaptionedImages,
    captioned_sprites,
    captioned_videos,
    is_held_out,
    load_images,
    load_splits,
    make_generator,
    read_caption,
    render_sprites,
    render_videos,
)
from rope_mm.data.synthetic.captioned_sprites import all_combinations, write_captions
from rope_mm.data.synthetic.sprites import BACKGROUND, COLOURS
from rope_mm.evaluation.sprites import classify_sprites, classify_videos

EVERY = all_combinations(FACTORS)


@pytest.fixture(scope="module")
def sprites():
    return captioned_sprites(count=1024, held_out=128)


@pytest.fixture(scope="module")
def videos():
    return captioned_videos(count=3072, held_out=512)


def factors_of(rows, names):
    return {name: torch.tensor(rows[name]) for name in names}


def jitters(count, key=0):
    return torch.randint(-1, 2, (count, 2), generator=make_generator("jitters", key))


def assert_says(verdict, factors):
    for name, factor in factors.items():
        assert torch.equal(verdict[name], factor), name


def test_the_same_seed_draws_the_same_rows_and_another_seed_others():
    for make in (captioned_sprites, captioned_videos):
        first, same, other = (make(count=40, held_out=8, seed=seed) for seed in (0, 0, 1))
        for split in ("train", "test"):
            assert first[split].to_dict() == same[split].to_dict()
            assert first[split].to_dict() != other[split].to_dict()


def test_no_combination_of_shape_colour_and_place_is_in_both_splits(sprites):
    train, test = (
        set(zip(*(sprites[split][name] for name in FACTORS), strict=True)) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (512, 64)
    assert not train & test


@pytest.mark.parametrize(("make", "names"), [("sprites", FACTORS), ("videos", VIDEO_FACTORS)])
def test_training_has_every_value_and_every_pair_of_values(make, names, request):
    train = factors_of(request.getfixturevalue(make)["train"], names)
    for one, other in combinations(names, 2):
        pairs = set(zip(train[one].tolist(), train[other].tolist(), strict=True))
        assert len(pairs) == len(names[one]) * len(names[other]), (one, other)


def test_no_frame_of_a_training_video_shows_what_is_held_out(videos):
    train, test = (factors_of(videos[split], VIDEO_FACTORS) for split in ("train", "test"))
    for factors, wanted in ((train, 0), (test, 1)):
        seen = classify_sprites(render_videos(factors, frames=3).flatten(0, 1))
        apart = (is_held_out(seen) & (seen["shape"] >= 0)).unflatten(0, (-1, 3)).any(1)
        assert apart.float().mean() == wanted
    assert not set(zip(*train.values(), strict=True)) & set(zip(*test.values(), strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_shows_what_its_caption_and_its_columns_say(split, sprites):
    rows = sprites[split]
    factors = factors_of(rows, FACTORS)
    assert_says(classify_sprites(CaptionedImages(rows, 16, 3).images()), factors)
    read = [read_caption(caption) for caption in rows["caption"]]
    assert_says({name: torch.tensor([row[name] for row in read]) for name in FACTORS}, factors)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_video_shows_what_its_caption_and_its_columns_say(split, videos):
    rows = videos[split].select(range(200))
    factors = factors_of(rows, VIDEO_FACTORS)
    shown = torch.stack(
        [
            torch.stack([torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in frames])
            for frames in rows["frames"]
        ]
    )
    shown = shown.view(200, 4, 16, 16, 3).permute(0, 1, 4, 2, 3)
    assert_says(classify_videos(shown), factors)
    read = [read_caption(caption) for caption in rows["caption"]]
    assert_says({name: torch.tensor([row[name] for row in read]) for name in VIDEO_FACTORS}, factors)


def test_the_stored_pixels_are_the_rendered_ones():
    rows = captioned_sprites(count=1, held_out=1, size=(12, 20), seed=3)["test"]
    image = rows[0]["image"]
    assert image.size == (20, 12)
    factors = factors_of(rows, FACTORS)
    drawn = [
        render_sprites(factors, (12, 20), torch.tensor([[y, x]])) for y in (-1, 0, 1) for x in (-1, 0, 1)
    ]
    assert image.tobytes() in [image[0].permute(1, 2, 0).numpy().tobytes() for image in drawn]


@pytest.mark.parametrize("phrase", SPRITE_PHRASES + VIDEO_PHRASES)
def test_every_combination_is_read_back_from_every_phrase(phrase):
    names = VIDEO_FACTORS if phrase in VIDEO_PHRASES else FACTORS
    factors = all_combinations(names)
    said = write_captions(factors, [phrase], [0] * len(factors["shape"]))
    read = [read_caption(caption) for caption in said]
    assert_says({name: torch.tensor([row[name] for row in read]) for name in names}, factors)
    assert len(set(said)) == len(said)


def test_what_a_caption_leaves_open_is_minus_one():
    named = read_caption("a red or blue circle moving left")
    assert named == {"shape": 0, "colour": -1, "row": -1, "column": -1, "motion": 4}
    assert set(read_caption("").values()) == {-1}


@pytest.mark.parametrize("size", [(8, 8), 16, (16, 33), (40, 12), 64])
def test_every_sprite_is_classified_right_at_any_size_and_jitter(size):
    for down, right in ((0, 0), (-1, 1), (1, -1)):
        jitter = torch.tensor([[down, right]]).expand(len(EVERY["shape"]), -1)
        drawn = render_sprites(EVERY, size, jitter)
        verdict = classify_sprites(drawn)
        assert_says(verdict, EVERY)
        assert verdict["distance"].max() < 0.5 / 127.5
        assert_says(classify_sprites(drawn / 127.5 - 1), EVERY)


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_the_classifier_is_right_under_noise(sigma):
    drawn = render_sprites(EVERY, 16, jitters(576)) / 127.5 - 1
    noise = sigma * torch.randn(drawn.shape, generator=make_generator("noise"))
    verdict = classify_sprites(drawn + noise)
    assert_says(verdict, EVERY)
    torch.testing.assert_close(verdict["distance"].mean(), torch.tensor(sigma), rtol=0.02, atol=0)


def test_the_classifier_sees_nothing_on_an_empty_canvas():
    empty = torch.tensor(BACKGROUND, dtype=torch.uint8)[None, :, None, None].expand(2, 3, 16, 16)
    verdict = classify_sprites(empty)
    assert all((verdict[name] == -1).all() for name in FACTORS)
    assert (verdict["distance"] == 0).all()
    assert (classify_videos(empty[None])["motion"] == -1).all()
    assert {len(part) for part in classify_sprites(empty[:0]).values()} == {0}


def test_the_classifier_finds_the_nearest_of_all_sprites_by_brute_force():
    images = torch.rand(5, 3, 16, 16, generator=make_generator("any")) * 2 - 1
    drawn = [
        (render_sprites(EVERY, 16, torch.tensor([[y, x]]).expand(576, -1)) / 127.5 - 1)
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    ]
    distance = torch.stack([torch.cdist(images.flatten(1), part.flatten(1)) for part in drawn]).amin(0)
    assert_says(
        classify_sprites(images), {name: factor[distance.argmin(1)] for name, factor in EVERY.items()}
    )


def test_a_sprite_is_of_its_colour_on_the_background():
    drawn = render_sprites(EVERY)
    lightest = drawn.flatten(2).long() - torch.tensor(BACKGROUND)[:, None]
    index = lightest.abs().sum(1).argmax(1)
    colour = drawn.flatten(2)[torch.arange(len(drawn)), :, index].long()
    assert torch.equal(colour, torch.tensor(list(COLOURS.values()))[EVERY["colour"]])


def test_a_larger_canvas_shows_the_same_image():
    jitter = jitters(len(EVERY["shape"]))
    small, large = (render_sprites(EVERY, size, jitter).float() for size in (16, 64))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert (pooled - small).abs().mean() < 1.5


@given(frames=st.integers(2, 9), seed=st.integers(0, 50))
def test_every_motion_goes_where_it_says_and_enters_again_opposite(frames, seed):
    factors = {
        name: torch.randint(len(words), (6,), generator=make_generator(seed, name))
        for name, words in FACTORS.items()
    }
    factors["motion"] = torch.arange(6)
    videos = render_videos(factors, frames, jitter=jitters(6, seed))
    for frame in range(frames):
        seen = classify_sprites(videos[:, frame])
        away = torch.arange(6) == 1 if frame % 2 else torch.zeros(6, dtype=torch.bool)
        rows = (factors["row"] + frame * torch.tensor([0, 0, -1, 1, 0, 0])) % 3
        columns = (factors["column"] + frame * torch.tensor([0, 0, 0, 0, -1, 1])) % 3
        expected = {**factors, "row": rows, "column": columns}
        assert_says(seen, {name: expected[name].where(~away, torch.tensor(-1)) for name in FACTORS})
    assert_says(classify_videos(videos), factors)


def test_a_video_that_follows_no_motion_has_none():
    factors = {name: torch.zeros(1, dtype=torch.long) for name in VIDEO_FACTORS}
    video = render_videos(factors, 4)
    there = render_sprites({**factors, "column": torch.tensor([2])})
    video[:, 3] = there
    verdict = classify_videos(video)
    assert (int(verdict["motion"]), int(verdict["shape"]), int(verdict["column"])) == (-1, 0, 0)
    video[:, 3] = render_sprites({**factors, "colour": torch.tensor([2])})
    verdict = classify_videos(video)
    assert (int(verdict["motion"]), int(verdict["colour"])) == (0, -1)


def test_sprites_and_videos_are_sources_by_name():
    train, test = load_images("sprites", size=16, channels=3, label="shape")
    assert (len(train), len(test)) == (8192, 512)
    assert train.images([0]).shape == (1, 3, 16, 16)
    assert {"digits", "sprites", "videos"} <= set(EMBEDDED)
    assert len(load_splits("videos")["train"][0]["frames"]) == 4
    with pytest.raises(ValueError, match="no column 'image'; it has frames, caption"):
        load_images("videos", size=16, channels=3)


ZERO = {name: torch.zeros(1, dtype=torch.long) for name in VIDEO_FACTORS}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: render_sprites(ZERO, 7), "8 pixels or more a side, not 7 x 7"),
        (
            lambda: render_sprites({**ZERO, "colour": torch.tensor([8])}),
            "colour 8 is unknown; there are 0 to 7",
        ),
        (lambda: render_sprites({**ZERO, "row": torch.tensor([-1])}), "row -1 is unknown; there are 0 to 2"),
        (
            lambda: render_sprites({"shape": ZERO["shape"]}),
            "the factor 'colour' is missing; there are: shape",
        ),
        (lambda: render_videos(ZERO, frames=1), "2 frames or more to show a motion, not 1"),
        (lambda: render_videos({name: ZERO[name] for name in FACTORS}), "the factor 'motion' is missing"),
        (lambda: captioned_sprites(count=0), "'train': 0"),
        (lambda: captioned_videos(phrases=()), "there are 0 and"),
        (
            lambda: classify_sprites(torch.zeros(1, 1, 16, 16)),
            r"must be \(n, 3, y, x\), not \(1, 1, 16, 16\)",
        ),
        (lambda: classify_videos(torch.zeros(1, 1, 3, 16, 16)), "2 frames or more"),
    ],
)
def test_what_cannot_be_rendered_or_classified_is_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
