"""Models without rotary beside plain decoders: encoder-decoders, sound, video, and patches of any shape.

The truth is an unpatched copy. Its attention gets q and k rotated in float64, by positions that are written
out here.
"""

import copy

import pytest
import torch
import transformers as hf
from prepared_models import prepared
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm import SCHEMES
from rope_mm.hf import explain, rope_of, set_rope, unset_rope

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE = {**SIZES, "image_size": 16, "patch_size": 4}
STACKS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99}
STACKS |= {
    f"{side}_{size}": n
    for side in ("encoder", "decoder")
    for size, n in (("attention_heads", 2), ("ffn_dim", 32))
}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
IDS, REPLY = torch.arange(3, 12)[None], torch.arange(3, 9)[None]


def noise(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def t5():
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=4, **TOKENS)
    return hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": REPLY}


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**STACKS, **TOKENS)), {
        "input_ids": IDS,
        "decoder_input_ids": REPLY,
    }


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**STACKS, **TOKENS, **sizes, **quiet))
    return model, {"input_features": noise(1, 8, 40), "decoder_input_ids": REPLY}


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2)), {
        "input_ids": IDS
    }


def hubert():
    return hf.HubertModel(hf.HubertConfig(**SIZES, **CONVOLUTIONS)), {"input_values": noise(2, 200)}


def siglip2():
    """Two images of 3 x 4 and 2 x 3 patches, the second padded."""
    mask = torch.tensor([[1] * 12, [1] * 6 + [0] * 6])
    inputs = {"pixel_values": noise(2, 12, 48), "pixel_attention_mask": mask}
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4))
    return model, inputs | {"spatial_shapes": torch.tensor([[3, 4], [2, 3]])}


def yolos():
    """Patches between a class token and tokens of detections."""
    config = hf.YolosConfig(**{**EYE, "image_size": [16, 16]}, num_detection_tokens=3)
    return hf.YolosModel(config), {"pixel_values": noise(1, 3, 16, 16)}


def video_mae():
    return hf.VideoMAEModel(hf.VideoMAEConfig(**EYE, num_frames=4)), {"pixel_values": noise(1, 4, 3, 16, 16)}


def masked_video_mae():
    model, inputs = video_mae()
    return model, {**inputs, "bool_masked_pos": torch.arange(32)[None] % 3 == 0}


def vit_mae():
    return hf.ViTMAEModel(hf.ViTMAEConfig(**EYE)), {
        "pixel_values": noise(1, 3, 16, 16),
        "noise": noise(1, 16),
    }


def spectrogram():
    config = hf.ASTConfig(
        **SIZES, patch_size=4, max_length=24, num_mel_bins=16, frequency_stride=4, time_stride=4
    )
    return hf.ASTModel(config), {"input_values": noise(1, 24, 16)}


def segformer():
    """Keys are of patches merged 2 x 2, then of all patches."""
    layers = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    layers |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return hf.SegformerModel(hf.SegformerConfig(**layers)), {"pixel_values": noise(1, 3, 32, 32)}


def grid(*sides):
    """Positions t, y, x of a grid, counted from 0."""
    sides = (1,) * (3 - len(sides)) + sides
    return (
        torch.stack(torch.meshgrid(*(torch.arange(n) for n in sides), indexing="ij"), -1).view(-1, 3).double()
    )


def line(n):
    """Positions of text: every axis counts."""
    return torch.arange(n)[:, None].expand(n, 3).double()


def still(n):
    return torch.zeros(n, 3, dtype=torch.double)


def positions_of_kept_patches():
    order = noise(1, 16).argsort(1)[0, :4]
    return torch.cat((still(1), grid(4, 4)[order]))


PLACES = {  # positions of n queries or keys of a model
    "text": line,
    siglip2: lambda n: torch.stack((grid(3, 4), torch.cat((grid(2, 3), still(6))))),
    yolos: lambda n: torch.cat((still(1), grid(4, 4), still(3))),
    video_mae: lambda n: grid(2, 4, 4),
    masked_video_mae: lambda n: grid(2, 4, 4)[torch.arange(32) % 3 != 0],
    vit_mae: lambda n: positions_of_kept_patches(),
    spectrogram: lambda n: torch.cat((still(2), grid(4, 6))),
    segformer: lambda n: {
        64: grid(8, 8),
        16: grid(4, 4),  # of the second stage, or the centres of the first one's merged patches
    }[n],
}


def rotated(x, p, omega):
    """Heads x (b, h, s, d) rotated in float64 at positions p (s, a) or (b, s, a), in halves."""
    angle = p @ omega
    cos, sin = (f(angle).view(-1, 1, *angle.shape[-2:]) for f in (torch.cos, torch.sin))
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x)


def truth(model, inputs, place, omega):
    """The outputs of a copy that transformers' own attention computes of q and k that are rotated here."""
    names = {id(module): name for name, module in model.named_modules()}
    merged = []

    def attend(module, q, k, *args, **kwargs):
        name = names[id(module)].lower()
        if "encdec" not in name and "encoder_attn" not in name:
            coarse = q.shape[2] == 64 > k.shape[2]
            merged.append(coarse)
            p, p_k = place(q.shape[2]), place(k.shape[2])
            q = rotated(q, p, omega)
            k = rotated(k, 2 * p_k + 0.5 * (p_k.new_tensor([0, 1, 1])) if coarse else p_k, omega)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("truth", attend)
    hf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(
        "truth", hf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "truth"
    out = model(**inputs)[0]
    assert merged
    return out


FAMILIES = [t5, bart, whisper, gpt2, hubert, *(make for make in PLACES if make != "text")]


@torch.no_grad()
@pytest.mark.parametrize("make", FAMILIES)
def test_self_attention_rotates_as_an_unpatched_copy_with_rotated_queries_and_keys(make):
    model, inputs = prepared(make)
    scheme = SCHEMES["grid"] if make in PLACES else SCHEMES["m-rope"].replace(axis_shares=None)
    before, other = model(**inputs)[0], copy.deepcopy(model)
    handle = set_rope(model, scheme, freq_scale=0.0, relative_bias="keep" if make is t5 else None)
    assert torch.equal(model(**inputs)[0], before)
    handle.undo()
    handle = set_rope(model, scheme, relative_bias="keep" if make is t5 else None)
    after, omega = model(**inputs)[0], rope_of(model).omega.double()
    exact = truth(other, inputs, PLACES.get(make, line), omega)
    seen = inputs.get("pixel_attention_mask")
    rows = torch.ones(before.shape[:2], dtype=torch.bool) if seen is None else seen.bool()
    assert (after - exact)[rows].norm() < 1e-5 * exact[rows].norm() < 1e-3 * (exact - before)[rows].norm()
    handle.undo()
    assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("make", [t5, bart, whisper, gpt2])
def test_every_cache_generates_what_no_cache_does(make):
    model, inputs = prepared(make)
    set_rope(model, "flat", relative_bias="keep" if make is t5 else None)
    inputs = {name: torch.cat((x, x.flip(-1))) for name, x in inputs.items() if "decoder" not in name}
    run = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "max_length": None}
    for beams in (1, 3):
        exact = model.generate(**inputs, **run, num_beams=beams, use_cache=False)
        for cache in (None, "static"):
            assert torch.equal(
                model.generate(**inputs, **run, num_beams=beams, cache_implementation=cache), exact
            )


@torch.no_grad()
@pytest.mark.parametrize("make", [t5, bart, whisper])
def test_cross_attention_is_left_alone_and_explain_says_so(make, capsys):
    model, _ = prepared(make)
    crossed = [m for name, m in model.named_modules() if name.endswith(("EncDecAttention", "encoder_attn"))]
    assert len(crossed) == 2
    states, far = noise(1, 4, 32), noise(1, 4, 32)
    call = {"key_value_states": far}
    before = [module(states, **call)[0] for module in crossed]
    set_rope(model, "flat", relative_bias="keep" if make is t5 else None)
    assert all(torch.equal(module(states, **call)[0], x) for module, x in zip(crossed, before, strict=True))
    explain(model)
    said = capsys.readouterr().out
    assert "4 attention modules: Scheme(layout='flat')" in said
    assert "cross-attention of 2 modules: not rotated" in said
    kept = "bias of relative positions (encoder.block.0.layer.0.SelfAttention.relative_attention_bias): kept"
    assert (kept if make is t5 else "position embeddings (") in said


def test_a_bias_of_relative_positions_is_kept_or_dropped_as_the_caller_says():
    model, inputs = prepared(t5)
    parts = [part for part in model.modules() if hasattr(part, "relative_attention_bias")]
    with pytest.raises(ValueError, match=r"give relative_bias='keep' .* or 'drop' for the rotation alone"):
        set_rope(model, "flat")
    with pytest.raises(ValueError, match="relative_bias must be one of keep, drop, not 'no'"):
        set_rope(model, "flat", relative_bias="no")
    with torch.no_grad():
        before = model(**inputs)[0]
        handle = set_rope(model, "flat", freq_scale=0.0, relative_bias="drop")
        dropped = model(**inputs)[0]
        handle.undo()
        assert torch.equal(model(**inputs)[0], before) and not torch.equal(dropped, before)
        for part in parts:
            part.relative_attention_bias.weight.zero_()
        assert len(parts) == 2 and torch.equal(model(**inputs)[0], dropped)
    with pytest.raises(
        ValueError, match="BartModel adds no bias of relative positions; leave relative_bias out"
    ):
        set_rope(bart()[0], "flat", relative_bias="keep")


@torch.no_grad()
@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_saved_encoder_decoder_waits_for_its_scheme(make, attention, tmp_path):
    model, inputs = prepared(make)
    set_rope(model, "flat", relative_bias="drop" if make is t5 else None)
    after = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    with pytest.raises(ValueError, match="saved with a scheme that is not set yet"):
        loaded(**inputs)
    set_rope(loaded)
    assert (loaded(**inputs)[0] - after).abs().max() < 1e-5
    unset_rope(loaded)
    unset_rope(model)
    assert (loaded(**inputs)[0] - model(**inputs)[0]).abs().max() < 1e-5


def test_an_encoder_may_have_a_scheme_alone():
    model, inputs = prepared(bart)
    before = model(**inputs)[0]
    set_rope(model.model.encoder, "flat")
    assert not torch.equal(model(**inputs)[0], before)
    unset_rope(model.model.encoder)
    assert torch.equal(model(**inputs)[0], before)


def test_checkpointed_layers_see_the_grid_of_their_own_forward():
    grads = []
    for checkpointing in (False, True):
        model, inputs = prepared(siglip2)
        set_rope(model, "grid")
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        wide = {**inputs, "spatial_shapes": torch.tensor([[4, 3], [3, 2]])}
        (model(**inputs)[0].square().mean() + model(**wide)[0].mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20 and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_an_attention_of_images_outside_of_its_model_is_refused():
    model, _ = prepared(video_mae)
    set_rope(model, "grid")
    with pytest.raises(ValueError, match="got no grid of patches; call the model that set_rope was given"):
        model.encoder.layer[0](noise(1, 32, 64))


def test_windows_and_patches_in_no_known_order_are_refused():
    model, _ = prepared(yolos)

    class Shuffled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            x = self.inner(*args, **kwargs)
            return x.roll(3, 1)[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]

    model.embeddings = Shuffled(model.embeddings)
    with pytest.raises(ValueError, match="which tokens of YolosModel are its patches cannot be seen"):
        set_rope(model, "grid")
