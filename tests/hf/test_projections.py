"""Attention that looks nothing up: rotated behind its projections, proved, saved, and locked until then."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from prepared_models import prepared

from rope_mm import SCHEMES
from rope_mm.hf import explain, rope_of, set_rope

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE, IDS = {**SIZES, "image_size": 16, "patch_size": 4}, torch.arange(3, 12)[None]
# peft 0.21 asks transformers by the older of two names
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def grid(y, x):
    p = torch.stack(torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij"), -1).view(-1, 2)
    return torch.nn.functional.pad(p, (1, 0)).double()


def line(n):
    return torch.arange(n)[:, None].expand(n, 3).double()


def behind_class(n):
    return torch.cat((torch.zeros(1, 3).double(), grid(4, 4)))


def windows(n):
    return grid(4, 4)


def mpnet():
    return hf.MPNetModel(hf.MPNetConfig(**SIZES, vocab_size=99)), {"input_ids": IDS}


def gpt_neo():
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(vocab_size=99, hidden_size=64, **layers)), {"input_ids": IDS}


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4)), {
        "input_ids": IDS
    }


def blip():
    return hf.BlipVisionModel(hf.BlipVisionConfig(**EYE)), {
        "pixel_values": torch.ones(1, 3, 16, 16).cumsum(-1)
    }


def longformer():
    """Its projections put tokens before rows."""
    model = hf.LongformerModel(hf.LongformerConfig(**SIZES, vocab_size=99, attention_window=[4, 4]))
    return model, {"input_ids": torch.stack((IDS[0, :8], IDS[0, :8].flip(0)))}


def donut():
    """Windows of 4 x 4 patches."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
    model = hf.DonutSwinModel(hf.DonutSwinConfig(**sizes, window_size=4))
    return model, {"pixel_values": torch.ones(1, 3, 32, 32).cumsum(-1).cumsum(-2) / 99}


def sam():
    """Windows of 4 x 4 patches, and all 8 x 8 of them."""
    sizes = {"image_size": 32, "patch_size": 4, "window_size": 4, "mlp_dim": 32, "output_channels": 8}
    config = hf.SamVisionConfig(**SIZES, **sizes, global_attn_indexes=[1])
    return hf.SamVisionModel(config), {"pixel_values": torch.ones(1, 3, 32, 32).cumsum(-1).cumsum(-2) / 99}


CASES = {  # what becomes of the bias, the names of projections, how heads lie in them, positions of n tokens
    mpnet: ("keep", ("q", "k"), "alone", line),
    gpt_neo: (None, ("q_proj", "k_proj"), "alone", line),
    bloom: ("keep", ("query_key_value",), "each head", line),
    blip: (None, ("qkv",), "each kind", behind_class),
    longformer: (None, ("query", "key"), "tokens first", line),
    donut: ("keep", ("query", "key"), "alone", windows),
    sam: ("drop", ("qkv",), "each kind", lambda n: grid(int(n**0.5), int(n**0.5))),
}


def rotated(x, p, omega):
    """Heads x (b, s, h, 16) rotated in float64 at positions p (s, a), in halves."""
    angle = (p @ omega)[:, None]
    first, second = x.double().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def hook(lies, place, omega):
    """A hook after a projection that rotates what lies in its output as told."""

    def turn(_module, _args, out):
        x = out.transpose(0, 1) if lies == "tokens first" else out.reshape(len(out), -1, out.shape[-1])
        p = place(x.shape[1])
        if lies == "each kind":
            q, k, v = x.chunk(3, -1)
            parts = [rotated(y.unflatten(-1, (-1, 16)), p, omega).flatten(2).to(out) for y in (q, k)]
            x = torch.cat((*parts, v), -1)
        elif lies == "each head":
            q, k, v = x.unflatten(-1, (-1, 3, 16)).unbind(3)
            x = torch.stack((rotated(q, p, omega).to(out), rotated(k, p, omega).to(out), v), 3)
        else:
            x = rotated(x.unflatten(-1, (-1, 16)), p, omega).to(out).flatten(2)
        return (x.transpose(0, 1) if lies == "tokens first" else x).reshape(out.shape)

    return turn


@torch.no_grad()
@pytest.mark.parametrize("make", CASES)
def test_queries_and_keys_behind_projections_rotate_as_in_float64(make):
    bias, names, lies, place = CASES[make]
    model, inputs = prepared(make)
    before = model(**inputs)[0]
    handle = set_rope(model, SCHEMES["grid"], freq_scale=0.0, relative_bias=bias)
    plain = model(**inputs)[0]
    assert bias == "drop" or torch.equal(plain, before)
    handle.undo()
    handle = set_rope(model, SCHEMES["grid"] if place != line else "m-rope", relative_bias=bias)
    after, omega = model(**inputs)[0], rope_of(model).omega.double()
    handle.undo()
    assert torch.equal(model(**inputs)[0], before)
    other, _ = prepared(make)
    for part in other.modules():
        part.use_rel_pos = False
    hooked = [
        getattr(part, name).register_forward_hook(hook(lies, place, omega))
        for part in other.modules()
        for name in names
        if "Attention" in type(part).__name__ and hasattr(part, names[0])
    ]
    exact = other(**inputs)[0]
    assert hooked
    assert (after - exact).norm() < 1e-5 * exact.norm() < 1e-3 * (exact - plain).norm()


def mpt():
    return hf.MptForCausalLM(hf.MptConfig(vocab_size=99, d_model=64, n_layers=2, n_heads=4)), {
        "input_ids": IDS
    }


def xglm():
    config = hf.XGLMConfig(vocab_size=99, d_model=64, num_layers=2, attention_heads=4, ffn_dim=32)
    return hf.XGLMForCausalLM(config), {"input_ids": IDS}


def led():
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "attention_window": [4, 4]}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    return hf.LEDForConditionalGeneration(hf.LEDConfig(vocab_size=99, **sizes)), {"input_ids": IDS}


@pytest.mark.parametrize("make", [gpt_neo, bloom, mpt, xglm, led])
def test_a_cache_that_is_filled_behind_projections_holds_rotated_keys(make):
    model, inputs = prepared(make)
    set_rope(model, "flat", relative_bias="keep" if make in (bloom, mpt) else None)
    run = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = model.generate(**inputs, **run, use_cache=False)
    assert torch.equal(model.generate(**inputs, **run), exact)


def test_adapters_that_come_later_and_would_not_be_rotated_are_refused():
    model, inputs = prepared(gpt_neo)
    set_rope(model, "flat")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj was replaced after set_rope, as by adapters"):
        adapted(**inputs)


def deberta(version="V2"):
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20}
    config = getattr(hf, f"Deberta{version}Config")(**SIZES, vocab_size=99, **more)
    return getattr(hf, f"Deberta{version}Model")(config), {"input_ids": IDS}


@torch.no_grad()
def test_queries_of_deberta_rotate_with_the_bias_that_it_adds_behind_its_projection():
    model, inputs = prepared(lambda: deberta(""))
    biases = [weight.normal_() for name, weight in model.named_parameters() if name.endswith("q_bias")]
    other = copy.deepcopy(model)
    handle = set_rope(model, "m-rope", freq_scale=0.0, relative_bias="drop")
    plain = model(**inputs)[0]
    handle.undo()
    set_rope(model, "m-rope", relative_bias="drop")
    after, omega = model(**inputs)[0], rope_of(model).omega.double()
    for part in other.modules():
        part.relative_attention = False
        if hasattr(part, "q_bias"):  # the same sum, as a bias of the projection
            q = part.q_bias.view(-1, 16)
            part.in_proj.bias = torch.nn.Parameter(torch.stack((q, 0 * q, 0 * q), 1).flatten())
            part.q_bias.zero_()
            part.in_proj.register_forward_hook(hook("each head", line, omega))
    exact = other(**inputs)[0]
    assert len(biases) == 2
    assert (after - exact).norm() < 1e-5 * exact.norm() < 1e-3 * (exact - plain).norm()


@torch.no_grad()
@pytest.mark.parametrize("make", [deberta, sam])
def test_scores_with_other_terms_of_the_queries_are_refused_unless_these_are_dropped(make):
    model, inputs = prepared(make)
    before = model(**inputs)[0]
    with pytest.raises(ValueError, match="do not depend on the product of its projections of q and k alone"):
        set_rope(model, "flat", relative_bias="keep")
    assert torch.equal(model(**inputs)[0], before)
    handle = set_rope(model, "flat", relative_bias="drop")
    assert not torch.equal(model(**inputs)[0], before)
    handle.undo()
    assert torch.equal(model(**inputs)[0], before)


def wavlm():
    """Its own function reads the weights past the modules of the projections."""
    more = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    more |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return hf.WavLMModel(hf.WavLMConfig(**SIZES, **more)), {
        "input_values": torch.ones(2, 300).cumsum(1).sin()
    }


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_wavlm_attends_by_its_projections_and_its_bias_is_kept_or_dropped():
    model, inputs = prepared(wavlm)
    inputs["attention_mask"] = (torch.arange(300) < torch.tensor([[300], [200]])).long()
    before = model(**inputs)[0]
    handle = set_rope(model, "flat", freq_scale=0.0, relative_bias="keep")
    assert (model(**inputs)[0] - before).abs().max() < 1e-5 * before.abs().max()
    handle.undo()
    handle = set_rope(model, "flat", relative_bias="keep")
    assert (model(**inputs)[0] - before).abs().max() > 0.1 * before.abs().max()
    handle.undo()
    handle = set_rope(model, "flat", relative_bias="drop")
    dropped = model(**inputs)[0]
    model.encoder.layers[0].attention.rel_attn_embed.weight.add_(1.0)
    assert torch.equal(model(**inputs)[0], dropped)
    handle.undo()
    assert not torch.equal(model(**inputs)[0], before)
    model.encoder.layers[0].attention.rel_attn_embed.weight.sub_(1.0)
    assert (model(**inputs)[0] - before).abs().max() < 1e-5 * before.abs().max()


def roformer(**more):
    return hf.RoFormerForCausalLM(
        hf.RoFormerConfig(**SIZES, vocab_size=99, embedding_size=64, is_decoder=True, **more)
    ), {"input_ids": IDS}


@torch.no_grad()
def test_the_scheme_takes_the_place_of_the_table_of_roformer(capsys, tmp_path):
    torch.manual_seed(0)
    model, inputs = roformer(initializer_range=0.3)
    before = model.eval()(**inputs)[0]
    handle = set_rope(model, "flat")  # its own, whose table has the rounding of float32
    assert rope_of(model).scheme.pairing == "interleaved"
    assert (model(**inputs)[0] - before).abs().max() < 1e-5 * before.abs().max()
    explain(model)
    assert "position embeddings" not in capsys.readouterr().out
    handle.undo()
    assert torch.equal(model(**inputs)[0], before)
    set_rope(model, "flat", theta=50.0)
    after = model(**inputs)[0]
    assert (after - before).abs().max() > 0.1 * before.abs().max()
    run = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **run), model.generate(**inputs, **run, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="saved with a scheme that is not set yet"):
        loaded(**inputs)
    set_rope(loaded)
    assert torch.equal(loaded(**inputs)[0], after)


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ({}, {"pairing": "half"}, "pairs channels 'half', but the weights are for 'interleaved'"),
        ({"rotary_value": True}, {}, "rotates its values too"),
    ],
)
def test_what_the_weights_of_roformer_do_not_fit_is_refused(more, changes, message):
    with pytest.raises(ValueError, match=message):
        set_rope(roformer(**more)[0], "flat", **changes)


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, vocab_size=99, pad_token_id=0)), {"input_ids": IDS}


LOAD = """
{first}
import sys, torch, transformers
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager")
        model(torch.arange(3, 12)[None])
        print("ran")
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_saved_scheme_that_no_rotary_module_looks_up_stops_a_fresh_process_too(tmp_path):
    names = []
    for make in (phi3, bloom):
        model, inputs = prepared(make)
        set_rope(model, "flat", theta=50.0, relative_bias="keep" if make is bloom else None)
        model.save_pretrained(tmp_path / make.__name__)
        waiting = type(model).from_pretrained(tmp_path / make.__name__).eval()
        waiting.save_pretrained(tmp_path / f"{make.__name__}-waiting")  # and what is saved of it waits too
        names += [type(model).__name__, str(tmp_path / make.__name__)]
        names += [type(model).__name__, str(tmp_path / f"{make.__name__}-waiting")]
        set_rope(waiting)
        with torch.no_grad():
            assert (waiting(**inputs)[0] - model(**inputs)[0]).abs().max() < 1e-5
    for first, said in (("", "not supported"), ("from rope_mm.hf import set_rope", "not set yet")):
        code = LOAD.format(first=first)
        done = subprocess.run(
            [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
        )
        lines = [line for line in done.stdout.splitlines() if line]
        assert len(lines) == 4 and all(said in line for line in lines), done.stdout
