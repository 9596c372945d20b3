"""Adapters of peft on models that rotate by a scheme: before or after, trained, saved, merged, undone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from rope_mm.hf import explain, positions_for, rope_of, set_rope, unset_rope, use_kernels

# peft 0.21 asks transformers 5.23 by the older of two names
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # of peft before 0.21: it looks for the config of a model without a name on the hub
    pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning"),
]
IDS = torch.arange(3, 16)[None]
SEGMENTS = "text:3 image:2x3 text:4"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@torch.no_grad()
def logits(model, **inputs):
    return model(IDS, **inputs).logits


def adapted(model, *targets):
    """A model with random adapters, the same every time."""
    torch.manual_seed(1)
    targets = targets or ("q_proj", "v_proj")
    return get_peft_model(model, LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False))


@pytest.fixture
def llama(tiny):
    return lambda: tiny("llama", initializer_range=0.2)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_scheme_may_come_before_or_after_the_adapters(llama, kernels):
    change = use_kernels if kernels else lambda model: None
    before, after = llama(), adapted(llama())
    plain = logits(after)
    set_rope(before, "rope-tv")
    change(before)
    before, handle = adapted(before), set_rope(after, "rope-tv")
    change(after)
    assert rope_of(before).scheme == rope_of(after).scheme
    p = positions_for(after, [SEGMENTS])
    assert torch.equal(p, positions_for(before, [SEGMENTS]))
    assert torch.equal(logits(before, position_ids=p), logits(after, position_ids=p))
    run = {"input_ids": IDS, "position_ids": p, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(before.generate(**run), after.generate(**run))
    handle.undo()
    unset_rope(before)
    assert torch.equal(logits(before), plain) and torch.equal(logits(after), plain)


def test_adapters_learn_and_come_back_from_where_they_were_saved(llama, tmp_path):
    model = llama()
    set_rope(model, "rope-tv")
    model = adapted(model).train()
    inputs = {"position_ids": positions_for(model, [SEGMENTS]), "labels": IDS}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(learned, lr=0.1), []
    for _ in range(3):
        loss = model(IDS, **inputs).loss
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in learned)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    set_rope(loaded, "rope-tv")
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))


def test_a_learned_omega_that_adapters_would_not_save_is_refused(llama):
    model = adapted(llama())
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"set_rope first, and then give peft modules_to_save=\['rotary_emb'\]"
    ):
        set_rope(model, "rope-tv", learnable=True)
    assert torch.equal(logits(model), before)


def test_a_learned_omega_learns_beside_adapters_and_is_saved_with_them(llama, tmp_path):
    model, base = llama(), llama()
    for one in (model, base):
        set_rope(one, "rope-tv", learnable=True)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["rotary_emb"]))
    model(IDS, labels=IDS).loss.backward()
    omegas = [p for name, p in model.named_parameters() if "learned" in name and p.requires_grad]
    assert len(omegas) == 1 and omegas[0].grad.abs().sum() > 0
    with torch.no_grad():
        omegas[0].mul_(1.5)
    model.eval().save_pretrained(tmp_path)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), before)


def test_merged_adapters_leave_the_scheme_and_unmerged_ones_the_model(llama):
    model = llama()
    before = logits(model)
    handle = set_rope(model, "rope-tv")
    inputs = {"position_ids": positions_for(model, [SEGMENTS])}
    model = adapted(model)
    ours = logits(model, **inputs)
    merged = model.merge_and_unload()
    assert (logits(merged, **inputs) - ours).abs().max() < 3e-5
    handle.undo()
    assert "rope_mm" not in str(merged.config.rope_parameters)
    other = adapted(llama())
    set_rope(other, "rope-tv")
    unset_rope(other.unload())
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("first", ["scheme", "adapters"])
def test_a_model_without_rotary_takes_a_scheme_and_adapters(first, capsys):
    torch.manual_seed(0)
    model, pixels = (
        ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4)).eval(),
        torch.rand(2, 3, 16, 16),
    )
    if first == "scheme":
        set_rope(model, "rope-vit-mixed")
    peft = adapted(model, "q_proj", "v_proj")
    if first == "adapters":
        with torch.no_grad():
            plain = peft(pixels).logits
        set_rope(peft, "rope-vit-axial")
        assert not torch.equal(peft(pixels).logits, plain)
    peft(pixels).logits.square().sum().backward()
    assert first == "adapters" or rope_of(peft).omega_param.grad is None  # peft freezes what is there
    explain(peft)
    assert "2 attention modules: " in capsys.readouterr().out
    unset_rope(peft)
    if first == "adapters":
        assert torch.equal(peft(pixels).logits, plain)


def test_a_text_model_without_rotary_takes_a_scheme_and_adapters():
    model = adapted(BertModel(BertConfig(**SIZES, vocab_size=99)).eval(), "query", "value")
    with torch.no_grad():
        before = model(IDS)[0]
        set_rope(model, "flat", freq_scale=0.0)
        assert torch.equal(model(IDS)[0], before)
        unset_rope(model)
        set_rope(model, "flat")
        assert not torch.equal(model(IDS)[0], before)
