"""Images in a conversation, against a truth that uses nothing of rope_mm.hf.

The truth is an unpatched copy whose rotary returns cosine and sine of place(segments) @ omega in float64,
each row alone, unpadded and without a cache.
"""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from vision_language_models import IMAGE, ROPE, TEXT, VIDEO, WINDOWED, qwen2_5_vl, visual_inputs, with_text

from rope_mm import SCHEMES
from rope_mm.checks.arguments import cache_of
from rope_mm.hf import positions_for, set_rope

WITHIN = 5e-5
SQUARE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE |= {"image_size": 16, "patch_size": 4}


def omni():
    torch.manual_seed(0)
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"output_dim": 64, "num_mel_bins": 16, "n_window": 4}
    text = {**TEXT, "rope_parameters": ROPE}
    ids = {"image_token_index": 90, "video_token_index": 91, "audio_token_index": 94}
    config = Qwen2_5OmniThinkerConfig(text_config=text, vision_config=WINDOWED, audio_config=audio, **ids)
    config.vision_start_token_id, config.audio_start_token_id = 92, 95
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else None
    return model


def llava():
    torch.manual_seed(0)
    text, vision = {**TEXT, "model_type": "llama"}, {**SQUARE, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=90)
    return LlavaForConditionalGeneration(config).eval()


def true_logits(model, segments, scheme, **inputs):
    """Logits of an unpatched model whose text stands where the scheme places these segments."""
    model = copy.deepcopy(model)
    positions, _ = SCHEMES[scheme].place(segments)
    angle = positions @ SCHEMES[scheme].omega(16)
    tables = [torch.cat((x, x), -1)[None].float() for x in (angle.cos(), angle.sin())]
    for part in model.modules():
        part.rope_deltas = None
        if "RotaryEmbedding" in (name := type(part).__name__) and "Vision" not in name:
            part.forward = lambda *_, **__: tables
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def image(*grids, text=3, last=4, video=False, first=5):
    """Inputs of text, images of these grids in patches with two tokens behind each, and text."""
    token, ids, said = VIDEO if video else IMAGE, [*range(first, first + text)], [f"text:{text}"]
    for t, y, x in grids:
        ids += [token] * (t * y * x // 4) + [7, 8]
        said += [f"video:{t}x{y // 2}x{x // 2}" if video else f"image:{y // 2}x{x // 2}", "text:2"]
    ids += range(20, 20 + last)
    inputs = visual_inputs(ids, grids, video, torch.Generator().manual_seed(len(ids)))
    return " ".join([*said, f"text:{last}"]), inputs


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("scheme", ["m-rope", "rope-tie", "videorope", "v2pe", "circle", "rope-tv"])
def test_two_conversations_of_one_model_continue_from_their_own_caches(scheme, cached):
    model, more = qwen2_5_vl(), torch.tensor([[30, 31, 32]])
    talks = [image((1, 4, 8)), image((1, 8, 8), (1, 4, 4), text=6)]
    truths = [
        true_logits(
            model,
            f"{said} text:3",
            scheme,
            **with_text(inputs, more),
        )
        for said, inputs in talks
    ]
    set_rope(model, scheme)
    with torch.no_grad():
        first = [model(**inputs) for _, inputs in talks]
    for out, truth in zip(first, truths, strict=True):
        second = logits(model, input_ids=more, **cached(cache_of(out)))
        assert (torch.cat((out.logits, second), 1) - truth).abs().max() < WITHIN


def test_a_second_turn_of_generate_continues_between_whole_steps(cached):
    model = qwen2_5_vl()
    said, inputs = image((1, 4, 8))
    run = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [90, 91, 92, 93]}
    run |= {"output_logits": True, "return_dict_in_generate": True}
    original = copy.deepcopy(model)
    set_rope(model, "circle")
    first = model.generate(**inputs, **run)
    ids = torch.cat((first.sequences, torch.tensor([[40, 41, 42]])), 1)
    second = model.generate(input_ids=ids, **cached(cache_of(first)), **run)
    kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 8))
    whole = inputs | {"input_ids": second.sequences[:, :-1], "mm_token_type_ids": kinds}
    truth = true_logits(original, f"{said} text:8", "circle", **whole)
    assert (torch.stack(second.logits, 1) - truth[:, -3:]).abs().max() < WITHIN


def test_a_new_image_in_the_second_turn_may_come_with_its_own_grid_alone(cached):
    model = qwen2_5_vl()
    (said, one), (more, two) = image((1, 4, 8)), image((1, 8, 4), first=30)
    joined = {name: torch.cat((one[name], two[name]), 0 if "ids" not in name else 1) for name in one}
    truth = true_logits(model, f"{said} {more}", "rope-tv", **joined)
    set_rope(model, "rope-tv")
    with torch.no_grad():
        out = model(**one)
    second = logits(model, **two, **cached(cache_of(out)))
    assert (torch.cat((out.logits, second), 1) - truth).abs().max() < WITHIN


def test_the_pace_of_a_video_is_kept_in_generate_of_qwen_omni():
    model = omni()
    said, inputs = image((4, 4, 4), video=True)
    inputs = {name: x for name, x in inputs.items() if name != "mm_token_type_ids"}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["video_second_per_grid"] = torch.tensor([4.0])
    truth = true_logits(model, said.replace("video:4x2x2", "video:4x2x2@4s"), "tm-rope", **inputs)
    set_rope(model, "tm-rope")
    assert (logits(model, **inputs) - truth).abs().max() < WITHIN
    run = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **run)
    assert (out.logits[0] - truth[:, -1]).abs().max() < WITHIN


def test_get_rope_index_gives_the_same_for_positional_and_keyword_arguments():
    model = qwen2_5_vl()
    set_rope(model, "rope-tv")
    _, inputs = image((1, 4, 8))
    ids, kinds = (
        torch.nn.functional.pad(inputs[name], (3, 0)) for name in ("input_ids", "mm_token_type_ids")
    )
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    named, delta = model.model.get_rope_index(
        input_ids=ids, mm_token_type_ids=kinds, image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
    )
    placed = model.model.get_rope_index(ids, kinds, inputs["image_grid_thw"], None, None, mask)
    assert torch.equal(placed[0], named) and torch.equal(placed[1], delta)
    with pytest.raises(ValueError, match="under our layout does not take second_per_grid;"):
        model.model.get_rope_index(ids, kinds, inputs["image_grid_thw"], second_per_grid=[1.0])


def with_positions_of_qwen(scheme):
    """A model set to a scheme, inputs with an image, Qwen's own positions of them, the true logits."""
    model = qwen2_5_vl()
    said, inputs = image((1, 4, 8))
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    truth = true_logits(model, said, scheme, **inputs)
    set_rope(model, scheme)
    return model, inputs, theirs, truth


def test_positions_of_another_rule_are_refused_where_images_stand_by_our_layout():
    model, inputs, theirs, truth = with_positions_of_qwen("rope-tv")
    ours, count = positions_for(model, inputs), torch.arange(theirs.shape[-1])[None, None]
    numbered = torch.cat((count, theirs))
    for ids in (theirs, numbered, theirs.float(), numbered.float(), ours.long(), ours[1:].round()):
        with pytest.raises(ValueError, match="whole numbers, as another rule makes them"):
            logits(model, **inputs, position_ids=ids)
    for ids in (count[0], count, count.expand(3, -1, -1), count.expand(4, -1, -1).float()):
        with pytest.raises(ValueError, match="would place an image as text"):
            logits(model, **inputs, position_ids=ids)
    for ids in (ours, ours[1:], ours + torch.tensor([0, 7, 7, 7])[:, None, None]):
        assert (logits(model, **inputs, position_ids=ids) - truth).abs().max() < WITHIN


def test_token_positions_alone_are_refused_for_images_that_come_as_embeddings():
    model = qwen2_5_vl()
    set_rope(model, "rope-tv")
    _, inputs = image((1, 4, 8))
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids), "mm_token_type_ids": types}
    for given in ({"input_ids": ids}, embedded):
        with pytest.raises(ValueError, match="would place an image as text"):
            model(**given, position_ids=torch.arange(ids.shape[1])[None])


def test_whole_positions_are_taken_where_the_layout_gives_the_same():
    model, inputs, theirs, truth = with_positions_of_qwen("m-rope")
    for ids in (theirs, theirs.float(), theirs + 5):
        assert (logits(model, **inputs, position_ids=ids) - truth).abs().max() < WITHIN


def test_images_are_placed_without_the_types_of_tokens_and_embeddings_alone_are_refused():
    model = qwen2_5_vl()
    said, inputs = image((1, 4, 8))
    truth = true_logits(model, said, "rope-tv", **inputs)
    set_rope(model, "rope-tv")
    bare = {name: x for name, x in inputs.items() if name != "mm_token_type_ids"}
    assert (logits(model, **bare) - truth).abs().max() < WITHIN
    bare["inputs_embeds"] = model.get_input_embeddings()(bare.pop("input_ids"))
    with pytest.raises(ValueError, match="embeddings alone do not say which of them are of an image"):
        logits(model, **bare)
    typed = {**bare, "mm_token_type_ids": inputs["mm_token_type_ids"]}
    assert (logits(model, **typed) - truth).abs().max() < WITHIN


def test_a_square_image_is_placed_where_its_processor_makes_no_grid():
    model = llava()
    ids = torch.tensor([[1, 5, *[90] * 16, 6, 7, *[90] * 16, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    truth = true_logits(model, "text:2 image:4x4 text:2 image:4x4 text:1", "rope-tv", **inputs)
    set_rope(model, "rope-tv")
    assert (logits(model, **inputs) - truth).abs().max() < WITHIN
    given = logits(model, **inputs, position_ids=positions_for(model, inputs))
    assert (given - truth).abs().max() < WITHIN
    run = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [90]}
    out = model.generate(**inputs, **run, output_logits=True, return_dict_in_generate=True)
    more = inputs | {"input_ids": out.sequences[:, :-1]}
    original = llava()
    truth = true_logits(original, "text:2 image:4x4 text:2 image:4x4 text:3", "rope-tv", **more)
    assert (torch.stack(out.logits, 1) - truth[:, -3:]).abs().max() < WITHIN


def test_an_image_of_unknown_size_is_refused_with_the_remedy():
    model = llava()
    set_rope(model, "rope-tv")
    inputs = {"input_ids": torch.tensor([[1, 5, *[90] * 12, 6]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    for ask in (lambda: logits(model, **inputs), lambda: positions_for(model, inputs)):
        with pytest.raises(ValueError, match="12 image tokens stand in a row without a grid and are not"):
            ask()


def test_a_cache_that_was_cropped_is_refused_and_given_positions_go_on_from_it(cached):
    model, more = qwen2_5_vl(), torch.tensor([[8, 9]])
    set_rope(model, "rope-tv")
    _, inputs = image((1, 4, 4), last=7)
    n = inputs["input_ids"].shape[1]
    short = inputs | {name: inputs[name][:, : n - 3] for name in ("input_ids", "mm_token_type_ids")}
    whole = with_text(short, more)
    cache = cache_of(model(**inputs, use_cache=True))
    cache.crop(-3)
    with pytest.raises(
        ValueError, match=f"held {n} tokens .* holds {n - 3} now: it was cropped, or filled els"
    ):
        logits(model, input_ids=more, **cached(cache))
    positions = positions_for(model, whole)[..., -2:]
    out = logits(model, input_ids=more, position_ids=positions, **cached(cache))
    assert (out - logits(model, **whole)[:, -2:]).abs().max() < WITHIN * out.abs().max()


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_the_whole_mask_needs_no_positions(padded, cached):
    model, more = qwen2_5_vl(), torch.tensor([[30, 31]])
    said, inputs = image((1, 4, 8))
    truth = true_logits(model, f"{said} text:2", "rope-tv", **with_text(inputs, more))
    set_rope(model, "rope-tv")
    pad = 3 * padded
    names = ("input_ids", "mm_token_type_ids")
    first = inputs | {name: torch.nn.functional.pad(inputs[name], (pad, 0)) for name in names}
    mask = (torch.arange(first["input_ids"].shape[1] + 2) >= pad).long()[None]
    with torch.no_grad():
        cache = cache_of(model(**first, attention_mask=mask[:, :-2]))
        for n, token in enumerate(more[0]):
            seen = mask[:, : mask.shape[1] - 1 + n]
            ours = model(input_ids=token[None, None], attention_mask=seen, **cached(cache)).logits
            assert (ours[:, 0] - truth[:, n - 2]).abs().max() < WITHIN


def test_a_mask_that_does_not_fit_is_refused():
    model = qwen2_5_vl()
    set_rope(model, "rope-tv")
    _, inputs = image((1, 4, 8))
    long = torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask has 19 columns.*0 tokens and 17 are new"):
        logits(model, **inputs, attention_mask=long)


VISION = {**SQUARE, "depth": 1, "num_heads": 2, "embed_dim": 32, "out_hidden_size": 64}


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma"])
def test_packed_rows_of_a_model_whose_outer_part_makes_the_mask_do_not_leak(model_type):
    text = {**TEXT, "num_hidden_layers": 1, "sliding_window": 64}
    text |= {"model_type": "gemma3_text" if model_type == "gemma3" else "gemma2"}
    vision = {**SQUARE, "model_type": "siglip_vision_model", "projection_dim": 64}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config).eval()
    set_rope(model, "rope-tv")
    parts = [torch.arange(3, 10)[None], torch.arange(20, 31)[None]]
    p = [positions_for(model, [f"text:{part.shape[1]}"]) for part in parts]
    alone = [
        logits(model, input_ids=part, position_ids=q, use_cache=False)
        for part, q in zip(parts, p, strict=True)
    ]
    packed = {"input_ids": torch.cat(parts, 1), "position_ids": torch.cat(p, -1)}
    with pytest.raises(ValueError, match="lets the documents see one another"):
        logits(model, **packed)
    together = logits(model, **packed, use_cache=False)
    assert (together - torch.cat(alone, 1)).abs().max() < WITHIN
