import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from rope_mm import SCHEMES, Image, Text, Video, place
from rope_mm.losses import PENALTIES, input_gradients, twice_differentiable
from rope_mm.models import (
    IMAGE_TOKEN,
    ImageBatcher,
    RopeMMConfig,
    RopeMMCritic,
    RopeMMForConditionalGeneration,
    RopeMMModel,
    SequenceBatch,
    build_batch,
    load_tokenizer,
    read_config,
)
from rope_mm.nn.attention import make_block_ids, make_mask_fn

SEQUENCE = ["see ", Image(2, 3), " and ", Video(2, 2, 2), "."]
EVEN = ["see ", Image(2, 4), " and ", Video(2, 2, 2), "."]  # what blocks of 2 x 2 patches tile, too


def inputs(config, *sequences):
    sequences = build_batch(sequences, load_tokenizer(), config.scheme)
    places = int((sequences.input_ids == config.image_token_id).sum())
    return sequences, torch.randn(places, config.patch_width)


@pytest.fixture
def config():
    return read_config(hidden_size=32, intermediate_size=48)


def test_a_text_token_sees_what_comes_before_it_and_a_patch_its_whole_frame():
    blocks, token = make_block_ids([Text(2), Image(1, 2), Text(1), Video(2, 1, 2)])[None], torch.arange(9)
    seen = make_mask_fn(blocks)(torch.tensor(0), torch.tensor(0), token[:, None], token)
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_a_sequence_becomes_text_tokens_image_tokens_and_their_positions(config):
    tokenizer = load_tokenizer()
    sequences = build_batch([SEQUENCE, ["ab"]], tokenizer, config.scheme)
    shape = [Text(4), Image(2, 3), Text(5), Video(2, 2, 2), Text(1)]
    assert torch.equal(sequences.positions[0], place(shape, "rope-tv")[0])
    assert torch.equal(sequences.block_ids[0], make_block_ids(shape))
    assert isinstance(sequences, SequenceBatch)
    is_image = sequences.input_ids[0] == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert is_image.nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9, 15, 16, 17, 18, 19, 20, 21, 22]
    assert tokenizer.decode(sequences.input_ids[0][:4]) == "see "
    assert sequences.input_ids[1][:2].tolist() == tokenizer("ab", add_special_tokens=False).input_ids


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs_in_the_model_and_gives_every_weight_a_gradient(scheme):
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme})
    model = RopeMMForConditionalGeneration(config)
    sequences, patches = inputs(config, EVEN, EVEN[:2])
    out = model(**sequences.inputs(), patches=patches, labels=sequences.input_ids)
    assert out.patches.shape == patches.shape
    assert out.logits.shape == (*sequences.input_ids.shape, config.vocab_size)
    (out.loss + out.patches.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_token_is_predicted_from_the_text_and_images_before_it_alone(config):
    model = RopeMMForConditionalGeneration(config).eval()
    sequences, patches = inputs(config, SEQUENCE)
    changed = sequences.inputs() | {"input_ids": sequences.input_ids.clone()}
    changed["input_ids"][0, 12] += 1  # a word between the image and the video
    before, after = model(**sequences.inputs(), patches=patches), model(**changed, patches=patches)
    assert torch.equal(before.logits[:, :12], after.logits[:, :12])
    assert not torch.allclose(before.logits[:, 12:], after.logits[:, 12:])


def test_a_patch_sees_the_other_patches_of_its_image_but_not_a_later_frame(config):
    model = RopeMMForConditionalGeneration(config).eval()
    sequences, patches = inputs(config, SEQUENCE)
    changed = patches.clone()
    changed[5] += 1  # the image's last patch
    before, after = (model(**sequences.inputs(), patches=p).patches for p in (patches, changed))
    assert (before[0] != after[0]).any()
    changed = patches.clone()
    changed[10] += 1  # in the video's second frame
    after = model(**sequences.inputs(), patches=changed).patches
    assert torch.equal(before[:10], after[:10])
    assert (before[10:] != after[10:]).any(dim=1).all()


def test_padding_does_not_change_the_outputs_of_a_row(config):
    model = RopeMMForConditionalGeneration(config).eval()
    alone, patches = inputs(config, SEQUENCE)
    padded = build_batch([SEQUENCE, [SEQUENCE[0] * 9]], load_tokenizer(), config.scheme)
    assert padded.input_ids.shape[1] > alone.input_ids.shape[1]
    one, two = model(**alone.inputs(), patches=patches), model(**padded.inputs(), patches=patches)
    torch.testing.assert_close(two.logits[:1, : one.logits.shape[1]], one.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two.patches, one.patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_does_not_depend_on_the_position_of_the_first_token(scheme):
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters={"scheme": scheme})
    model = RopeMMForConditionalGeneration(config).double().eval()
    sequences, patches = inputs(config, EVEN)
    inputs_here, inputs_there = sequences.inputs(), sequences.inputs()
    inputs_there["position_ids"][1:] += 777.7  # row 0 numbers the tokens
    here, there = (model(**kwargs, patches=patches.double()) for kwargs in (inputs_here, inputs_there))
    inputs_there["position_ids"][1:, :, 5:] += 777.7
    torn = model(**inputs_there, patches=patches.double())
    assert not torch.allclose(torn.logits, here.logits, atol=1e-4)  # where the distance changes, so it does
    torch.testing.assert_close(here.logits, there.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(here.patches, there.patches, atol=1e-9, rtol=1e-9)


def test_a_model_learns_a_sentence_by_heart(config):
    model, tokenizer = RopeMMForConditionalGeneration(config), load_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sequences = build_batch([["to be or not to be"]], tokenizer, config.scheme)
    for _ in range(60):
        loss = model(**sequences.inputs(), labels=sequences.input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = model(**sequences.inputs()).logits
    assert cross_entropy(logits[0, :-1], sequences.input_ids[0, 1:]) < 0.3


def test_bounded_patches_lie_in_the_range_of_pixels(config):
    sequences, patches = inputs(config, SEQUENCE)
    settings = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 2.0}
    free, bounded = (
        RopeMMForConditionalGeneration(read_config(**settings, bounded_patches=b)) for b in (False, True)
    )
    assert free(**sequences.inputs(), patches=patches).patches.abs().max() > 1
    assert bounded(**sequences.inputs(), patches=patches).patches.abs().max() <= 1


def test_logits_are_skipped_on_request(config):
    sequences, patches = inputs(config, SEQUENCE)
    model = RopeMMForConditionalGeneration(config)
    assert model(**sequences.inputs(), patches=patches, return_logits=False).logits is None


@pytest.mark.parametrize("learnable", [False, True])
def test_a_saved_model_reads_back_to_the_bit(config, tmp_path, learnable):
    rope = {"scheme": "m-rope", "theta": 500.0, "axis_shares": [1, 1, 2], "learnable": learnable}
    config = read_config(hidden_size=32, intermediate_size=48, rope_parameters=rope)
    model = RopeMMForConditionalGeneration(config).eval()
    if learnable:
        model.model.rotary.omega_param.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = RopeMMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.scheme == config.scheme
    assert again.config.rope_parameters["rope_theta"] == 500.0
    sequences, patches = inputs(config, SEQUENCE)
    one, two = (m(**sequences.inputs(), patches=patches) for m in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(one.logits, two.logits)
    torch.testing.assert_close(one.patches, two.patches)


def test_a_saved_critic_reads_back_and_auto_classes_know_the_backbone(config, tmp_path):
    from transformers import AutoConfig, AutoModel

    critic = RopeMMCritic(config).eval()
    critic.save_pretrained(tmp_path)
    sequences, patches = inputs(config, SEQUENCE, SEQUENCE)
    again = RopeMMCritic.from_pretrained(tmp_path).eval()
    scores = critic(**sequences.inputs(), patches=patches)
    assert scores.shape == (2,)
    # the weights are the same bits; sums over them are not, where a file's mapping is aligned otherwise
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), critic.parameters(), strict=True))
    torch.testing.assert_close(again(**sequences.inputs(), patches=patches), scores)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RopeMMConfig)
    assert AutoConfig.from_pretrained(tmp_path).scheme == config.scheme
    assert isinstance(AutoModel.from_config(config), RopeMMModel)


def test_the_image_token_in_a_caption_is_read_as_text(config):
    sequences = build_batch([["an <image> here", Image(1, 2)]], load_tokenizer(), config.scheme)
    assert int((sequences.input_ids == config.image_token_id).sum()) == 2


def test_a_word_level_tokenizer_of_transformers_serves_as_well(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "seven": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = read_config(vocab_size=len(tokenizer), image_token_id=image)
    sequences = build_batch([["a seven", Image(1, 2)]], tokenizer, config.scheme)
    assert sequences.input_ids.tolist() == [[1, 2, image, image]]
    out = RopeMMForConditionalGeneration(config)(**sequences.inputs(), patches=torch.randn(2, 4))
    assert out.logits.shape == (1, 4, 4)


def test_a_saved_tokenizer_is_loaded_by_its_folder(tmp_path):
    load_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("seven").input_ids == load_tokenizer()("seven").input_ids
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_the_critics_penalty_trains_every_weight_and_agrees_with_finite_differences(config):
    critic = RopeMMCritic(config).double()
    sequences, patches = inputs(config, SEQUENCE[:2], SEQUENCE[:2])
    patches = patches.double().view(2, 6, -1).requires_grad_()
    with twice_differentiable():
        scores = critic(**sequences.inputs(), patches=patches)
    gradient = input_gradients(scores, patches)
    PENALTIES["r1"](gradient, gradient).backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in critic.parameters()) >= 20
    step = 1e-6 * torch.randn_like(patches)
    moved = critic(**sequences.inputs(), patches=patches.detach() + step) - scores
    torch.testing.assert_close(moved, (gradient * step).flatten(1).sum(1), atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sizee": 3}, "the model has no field .hidden_sizee.; did you mean hidden_size.*help"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "must be a multiple of"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"rope_parameters": {"scheme": "rope-vt"}}, "did you mean 'rope-tv"),
        ({"rope_parameters": {"scheme": "rope-tv", "bases": 3}}, "a scheme has no field 'bases'"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_config_with_wrong_settings_is_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(**settings)
    assert "\n" not in str(error.value)


def test_another_number_of_patches_than_image_tokens_is_refused(config):
    sequences, patches = inputs(config, SEQUENCE)
    with pytest.raises(ValueError, match="13 patches came for 14 image tokens"):
        RopeMMModel(config)(**sequences.inputs(), patches=patches[:-1])
    with pytest.raises(ValueError, match="9 x 9 pixels do not divide into patches of 2 x 2"):
        _ = ImageBatcher(config, load_tokenizer(), 9).grid


@pytest.mark.parametrize("patch_size", [2, 8])
def test_patch_embeddings_have_the_initial_scale_of_the_config(patch_size):
    config = read_config(hidden_size=512, patch_size=patch_size, num_channels=3)
    for own, loudness in ((0.0, 0.1), (0.02, 0.02)):
        config.patch_initializer_range = own
        embed = RopeMMForConditionalGeneration(config).model.embed
        seen = embed.patches(torch.randn(64, config.patch_width))
        assert seen.std().item() == pytest.approx(loudness * config.patch_width**0.5, rel=0.1)
        assert embed.tokens.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
