"""Models that have no rotary, such as ViT, CLIP and BERT, get one."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm import SCHEMES, Image, Rotary, Scheme, Text, Unrotated, rotate
from rope_mm.hf import explain, rope_of, set_rope, unset_rope, use_kernels

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYE, READER = {**SMALL, "image_size": 16, "patch_size": 4}, {**SMALL, "vocab_size": 100}
BARE = [
    (ViTModel, ViTConfig(**EYE)),
    (ViTForImageClassification, ViTConfig(**EYE)),
    (CLIPVisionModel, CLIPVisionConfig(**EYE)),
    (SiglipVisionModel, SiglipVisionConfig(**EYE)),
    (Dinov2Model, Dinov2Config(**EYE)),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**EYE)),
    (DeiTModel, DeiTConfig(**EYE)),
    (BertModel, BertConfig(**READER)),
    (BertForMaskedLM, BertConfig(**READER)),
    (RobertaModel, RobertaConfig(**READER)),
    (ElectraModel, ElectraConfig(**READER)),
    (CLIPTextModel, CLIPTextConfig(**READER, bos_token_id=1, eos_token_id=2)),
]


def bare(cls, config, attention="sdpa"):
    return cls._from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def run(model, at=0):
    kind = model.main_input_name
    torch.manual_seed(at)
    x = torch.randn(2, 3, 16, 16) if kind == "pixel_values" else torch.randint(3, 99, (2, 9))
    return model(**{kind: x})[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("cls", "config"), BARE)
def test_models_without_rotary_are_not_rotated_at_omega_zero_and_are_undone(cls, config, attention):
    model = bare(cls, config, attention)
    before = run(model)
    handle = set_rope(model, "rope-vit-axial", freq_scale=0.0) if "image_size" in config.to_dict() else None
    handle = handle or set_rope(model, "flat", freq_scale=0.0)
    assert torch.equal(run(model), before)
    handle.undo()
    set_rope(model, "rope-tv")
    assert not torch.equal(run(model), before)
    other = copy.deepcopy(model)
    assert torch.equal(run(other), run(model))
    unset_rope(other)
    assert torch.equal(run(other), before)
    assert not torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("cls", "config", "segments"),
    [(ViTModel, ViTConfig(**EYE), [Unrotated(1), Image(4, 4)]), (BertModel, BertConfig(**READER), [Text(9)])],
)
def test_queries_and_keys_are_rotated_as_the_definition_says(cls, config, segments):
    heads = []

    def watch(module, q, k, v, *args, **kwargs):
        heads.append((q, k))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("watch", watch)
    model = bare(cls, config)
    model.config._attn_implementation = "watch"
    run(model)
    plain = heads[0]
    set_rope(model, "rope-vit-axial")
    heads.clear()  # of its probe
    run(model)
    p, _ = SCHEMES["rope-vit-axial"].place(segments)
    omega = SCHEMES["rope-vit-axial"].omega(16)
    exact = rotate(*(x.double().transpose(1, 2) for x in plain), p, omega, "interleaved")
    for ours, true in zip(heads[0], exact, strict=True):
        assert (ours.transpose(1, 2) - true).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", ["rope-vit-mixed", "dinov3", "golden-gate"])
def test_checkpointing_a_model_that_had_none_with_two_forwards_before_one_backward(scheme):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = bare(CLIPVisionModel, CLIPVisionConfig(**EYE))
        set_rope(model, scheme)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        (run(model, 0).square().mean() + run(model, 1).mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20 and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize(("cls", "config"), [BARE[0], BARE[3], BARE[7]])
def test_a_model_that_had_none_compiles_to_one_graph(cls, config):
    torch._dynamo.reset()
    model = bare(cls, config)
    set_rope(model, "rope-tv")
    with torch.no_grad():
        assert (
            run(torch.compile(model, fullgraph=True, backend="aot_eager")) - run(model)
        ).abs().max() < 2e-6


def test_with_two_towers_the_caller_must_name_one():
    config = CLIPConfig(text_config=READER, vision_config=EYE)
    with pytest.raises(ValueError, match="give one of its parts: text_model, vision_model"):
        set_rope(CLIPModel(config), "rope-tv")


def test_what_has_no_attention_that_can_be_served_is_refused():
    with pytest.raises(ValueError, match="neither a rotary module nor one stack of attention"):
        set_rope(torch.nn.Linear(2, 2), Scheme(layout="flat"))


def test_a_choice_about_a_bias_is_refused_where_there_is_none(tiny):
    for model in (tiny("llama"), bare(ViTModel, ViTConfig(**EYE))):
        with pytest.raises(ValueError, match="adds no bias of relative positions; leave relative_bias out"):
            set_rope(model, "flat", relative_bias="keep")


@pytest.mark.parametrize("kernels", [False, True])
def test_unset_rope_leaves_nothing_of_rope_mm_behind(tiny, kernels):
    model = tiny("llama") if kernels else bare(ViTModel, ViTConfig(**EYE))

    def traces():
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        return [sorted(vars(m)) for m in model.modules()], hooks, model.config.to_dict()

    model.config.rope_parameters = getattr(model.config, "rope_parameters", None)
    before = traces()
    set_rope(model, "flat")
    use_kernels(model) if kernels else run(model)
    assert traces() != before
    unset_rope(model)
    assert traces() == before


def test_a_custom_rotary_module_is_the_one_that_runs():
    rope = Rotary(16, "rope-vit-mixed", heads=4)
    model = bare(ViTModel, ViTConfig(**EYE))
    set_rope(model, rope)
    assert rope_of(model) is rope
    run(model).square().sum().backward()
    assert rope.omega_param.grad.abs().sum() > 0


def test_explain_says_how_many_pairs_stand_still_where_there_are_images_alone(capsys):
    model = bare(ViTModel, ViTConfig(**EYE))
    for scheme, said in (("rope-tv", True), ("rope-vit-axial", False), ("flat", False)):
        set_rope(model, scheme)
        explain(model)
        line = "patches differ on other axes than t: 22 of 64 pairs stand still"
        assert (line in capsys.readouterr().out) == said
        unset_rope(model)
