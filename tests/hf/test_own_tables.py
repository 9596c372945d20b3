"""Models that rotate by tables of their own: GPT-J and CodeGen by sines, V-JEPA 2 inside its attention."""

import copy

import pytest
import torch
import transformers as hf
from prepared_models import enlarged

from rope_mm.hf import explain, positions_for, rope_of, set_rope, unset_rope, use_kernels

IDS = torch.arange(3, 12)[None]


def gpt(name, **more):
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**sizes, bos_token_id=1, eos_token_id=2, **more)
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    return enlarged(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTJ", "CodeGen"])
def test_a_rotary_with_a_table_is_read_replaced_saved_and_restored(name, tmp_path):
    model = gpt(name)
    before, own = model(IDS)[0], rope_of(model)
    assert (own.pairing, own.pairs, own.scheme.fraction, own.scheme.theta) == ("interleaved", 4, 0.5, 1e4)
    handle = set_rope(model, own)
    assert torch.equal(model(IDS)[0], before)
    handle.undo()
    handle = set_rope(model, "flat")
    assert (model(IDS)[0] - before).abs().max() < 1e-5 * before.abs().max()
    handle.undo()
    handle = set_rope(model, "rope-tv", theta=50.0)
    after = model(IDS)[0]
    assert (after - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="saved with a scheme that is not set yet"):
        loaded(IDS)
    set_rope(loaded)
    assert torch.equal(loaded(IDS)[0], after)
    handle.undo()
    assert torch.equal(model(IDS)[0], before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTJ", "CodeGen"])
def test_a_model_with_a_table_places_images_and_decodes_as_its_forward(name):
    model = gpt(name)
    set_rope(model, "rope-tv")
    p = positions_for(model, ["text:2 image:2x2 text:3"])
    assert not torch.equal(model(IDS, position_ids=p)[0], model(IDS)[0])
    run = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    run["position_ids"] = p
    assert torch.equal(model.generate(IDS, **run), model.generate(IDS, **run, use_cache=False))


@pytest.mark.parametrize("name", ["GPTJ", "CodeGen"])
def test_use_kernels_says_that_queries_and_keys_are_rotated_in_two_calls(name):
    model = gpt(name)
    with pytest.raises(
        ValueError,
        match=f"{name}Attention rotates queries and keys in two calls, and our op takes both in one",
    ):
        use_kernels(model)
    assert rope_of(model).pairing == "interleaved"


def vjepa2():
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"pred_hidden_size": 64, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.VJEPA2Model(hf.VJEPA2Config(**sizes, patch_size=8, crop_size=16, frames_per_clip=4)).eval()
    return enlarged(model, 0.2)


@torch.no_grad()
def test_the_rotation_inside_the_attention_of_vjepa_2_gives_way_to_the_scheme():
    model, video = vjepa2(), torch.randn(1, 4, 3, 16, 16)
    masks = {"context_mask": [torch.tensor([[0, 2, 3, 7]])], "target_mask": [torch.tensor([[1, 5]])]}
    outputs = [model(video)[0], model(video, **masks).predictor_output[0]]
    other = copy.deepcopy(model)
    set_rope(model, "grid")
    omega, calls = rope_of(model).omega.double(), []

    def turn(heads, ids):
        angle = torch.stack(torch.broadcast_tensors(*ids), -1).double() @ omega
        calls.append(angle.shape)
        first, second = heads.double().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(heads)

    for part in other.modules():
        if hasattr(part, "apply_rotary_embeddings"):
            part.apply_rotary_embeddings = turn
    for inputs, pick in (({}, lambda x: x[0]), (masks, lambda x: x.predictor_output[0])):
        ours, exact = pick(model(video, **inputs)), pick(other(video, **inputs))
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    assert calls
    unset_rope(model)
    assert torch.equal(model(video)[0], outputs[0])
    assert torch.equal(model(video, **masks).predictor_output[0], outputs[1])
    assert all(torch.isfinite(x).all() for x in outputs)


HYBRID = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID |= {"vocab_size": 99, "pad_token_id": 0}


def jamba():
    more = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    return hf.JambaModel(hf.JambaConfig(**HYBRID, **more, use_mamba_kernels=False, mamba_dt_rank=4)), 2


def granite_moe_hybrid():
    more = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2, "mamba_n_heads": 8}
    more |= {"mamba_d_head": 16, "mamba_n_groups": 1, "num_local_experts": 2, "shared_intermediate_size": 32}
    return hf.GraniteMoeHybridModel(hf.GraniteMoeHybridConfig(**HYBRID, **more)), 1


def recurrent_gemma():
    more = {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16}
    return hf.RecurrentGemmaModel(hf.RecurrentGemmaConfig(**HYBRID, **more)), None  # has a rotary


@torch.no_grad()
@pytest.mark.parametrize("make", [jamba, granite_moe_hybrid, recurrent_gemma])
def test_the_attention_layers_of_hybrids_take_a_scheme(make, capsys):
    torch.manual_seed(0)
    model, attentions = make()
    for weight in model.eval().parameters():
        if weight.dim() == 2:
            weight.normal_(0, 0.2)
    before = model(IDS)[0]
    same = {"freq_scale": 0.0} if attentions else {"theta": 1e4}
    handle = set_rope(model, "flat", **same)
    near = (model(IDS)[0] - before).abs().max()
    assert near < 1e-4 and (near == 0 or not attentions)
    handle.undo()
    set_rope(model, "flat", theta=50.0)
    assert (model(IDS)[0] - before).abs().max() > 1e-3
    explain(model)
    lines = capsys.readouterr().out
    assert f"{attentions} attention modules" in lines if attentions else "rotary_emb" in lines
    unset_rope(model)
    assert torch.equal(model(IDS)[0], before)
