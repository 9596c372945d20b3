"""Models that accelerate spreads: layers on the disk, weights on the meta device until they are needed."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope, use_kernels

IDS = torch.arange(3, 16)[None]
SEGMENTS = "text:3 image:2x3 text:4"
CPU = torch.device("cpu")
PLACES = dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
)
EYE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@torch.no_grad()
def logits(model, **inputs):
    return model(IDS, **inputs).logits


@pytest.fixture
def llama(tiny):
    return tiny("llama", initializer_range=0.2)


@pytest.fixture
def spread(llama, tmp_path):
    """The same Llama, its last layer on the disk."""
    llama.save_pretrained(tmp_path / "model")
    where = {"device_map": PLACES | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **where).eval()
    assert next(model.model.layers[1].parameters()).is_meta
    return model


@pytest.mark.parametrize("kernels", [False, True])
def test_with_layers_on_the_disk_a_scheme_runs_as_in_memory_and_is_undone(llama, spread, kernels):
    before, hooked = (
        logits(spread),
        [name for name, part in spread.named_modules() if hasattr(part, "_hf_hook")],
    )
    assert rope_of(spread) == rope_of(llama)
    handle, _ = set_rope(spread, "rope-tv"), set_rope(llama, "rope-tv")
    if kernels:
        use_kernels(spread)
    p = positions_for(llama, [SEGMENTS])
    assert (logits(spread, position_ids=p) - logits(llama, position_ids=p)).abs().max() < 3e-5
    out = spread.generate(input_ids=IDS, position_ids=p, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, llama.generate(input_ids=IDS, position_ids=p, max_new_tokens=3, do_sample=False))
    handle.undo()
    assert torch.equal(logits(spread), before)
    assert [name for name, part in spread.named_modules() if hasattr(part, "_hf_hook")] == hooked


def test_a_model_dispatched_to_one_device_is_patched_like_any_other(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    for one in (model, llama):
        set_rope(one, "rope-tv")
    p = positions_for(llama, [SEGMENTS])
    assert torch.equal(logits(model, position_ids=p), logits(llama, position_ids=p))


def test_a_model_that_runs_a_scheme_can_be_spread_afterwards(llama):
    before = logits(llama)
    set_rope(llama, "rope-tv")
    p = positions_for(llama, [SEGMENTS])
    ours = logits(llama, position_ids=p)
    dispatch_model(llama, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(llama, position_ids=p), ours)
    unset_rope(llama)
    assert torch.equal(logits(llama), before)


def test_a_learned_omega_that_was_offloaded_is_refused(llama):
    set_rope(llama, "rope-tv", learnable=True)
    cpu_offload(llama, CPU)
    with pytest.raises(ValueError, match="learned Omega is on the meta device"):
        logits(llama)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_model_built_without_memory_takes_a_scheme_there(llama, learnable):
    with torch.device("meta"):
        empty = type(llama)(copy.deepcopy(llama.config))
        set_rope(empty, "rope-tv", learnable=learnable)
    assert all(weight.is_meta for weight in empty.parameters())
    set_rope(llama, "rope-tv", learnable=learnable)
    empty.to_empty(device="cpu").load_state_dict(llama.state_dict())
    p = positions_for(llama, [SEGMENTS])
    assert torch.equal(logits(empty.eval(), position_ids=p), logits(llama, position_ids=p))


def test_our_op_is_refused_where_tokens_are_embedded_from_the_meta_device(llama):
    before = logits(llama)
    cpu_offload(llama, CPU)
    with pytest.raises(ValueError, match="the model is as it was"):
        use_kernels(llama)
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("spread_first", [False, True])
def test_attention_without_rotary_keeps_its_hooks(spread_first):
    torch.manual_seed(0)
    model, pixels = ViTModel(ViTConfig(**EYE, image_size=16, patch_size=4)).eval(), torch.randn(1, 3, 16, 16)
    run = torch.no_grad()(lambda: model(pixels)[0])
    before = run()
    handle = set_rope(model, "rope-vit-axial")
    ours = run()
    if spread_first:
        handle.undo()
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if spread_first:
        assert torch.equal(run(), before)
        handle = set_rope(model, "rope-vit-axial")
    assert torch.equal(run(), ours)
    handle.undo()
    assert torch.equal(run(), before)
    assert all(hasattr(layer.attention, "_hf_hook") for layer in model.layers)
    assert all("forward" in vars(layer.attention) for layer in model.layers)
