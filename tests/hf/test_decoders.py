import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, StaticCache, Trainer, TrainingArguments

from rope_mm import SCHEMES, Rotary, Scheme
from rope_mm.checks.arguments import cache_of
from rope_mm.hf import Handle, ModelRope, explain, positions_for, rope_of, set_rope, unset_rope, use_kernels
from rope_mm.rotary import definition as rotation
from rope_mm.schemes.extensions import YaRN
from rope_mm.schemes.zoo import MULTIMODAL, TEXT

IDS = torch.arange(3, 27).view(2, 12)
# decoding in float32 with these weights and logits near 5; measured 1.3e-5 over all schemes
WITHIN = 3e-5
OWN = ["llama", "gemma3_text", "gpt_neox", "glm", "cohere", "gpt_oss", "olmo2", "phi"]
OWN += ["deepseek_v2", "deepseek_v3", "llama4_text", "qwen3"]
# one Omega for all heads, and text tokens that advance along every axis
SERVED = [
    name for name in (*TEXT, *MULTIMODAL) if not SCHEMES[name].per_head and all(SCHEMES[name].text_line[1])
]


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def strong(tiny, model_type="llama", **more):
    """A model whose logits feel positions: its weights are ten times the usual."""
    return tiny(model_type, initializer_range=0.2, **more)


@pytest.mark.parametrize("model_type", OWN)
def test_a_model_is_unchanged_under_its_own_rope_and_after_unset_rope(tiny, model_type):
    model = tiny(model_type)
    before = logits(model)
    modules = dict(model.named_modules())
    handle = set_rope(model, rope_of(model))
    assert isinstance(handle, Handle)
    assert torch.equal(logits(model), before)
    handle.undo()
    assert torch.equal(logits(model), before)
    assert dict(model.named_modules()) == modules


def test_the_scheme_read_from_a_model_is_found_by_name(tiny):
    assert rope_of(tiny("llama")).scheme == SCHEMES["flat"]
    assert rope_of(tiny("gpt_neox")).scheme == SCHEMES["gpt-neox"]


def test_the_pairing_is_detected_from_the_function_and_not_from_its_tables(tiny):
    assert {name: rope_of(tiny(name)).pairing for name in ("llama", "helium", "deepseek_v3", "cohere")} == {
        "llama": "half",
        "helium": "interleaved",
        "deepseek_v3": "interleaved",
        "cohere": "interleaved",
    }


def test_a_named_scheme_with_exact_angles_differs_by_the_rounding_of_theirs(tiny):
    model = strong(tiny)
    before = logits(model)
    set_rope(model, "flat")
    assert 0 < (logits(model) - before).abs().max() < 2e-5
    assert rope_of(model).scheme == SCHEMES["flat"]


def test_tables_are_those_of_the_definition(tiny):
    model = tiny("llama")
    set_rope(model, "rope-tv")
    p = positions_for(model, ["text:3 image:2x3 text:4"])
    cos, sin = model.model.rotary_emb(torch.zeros(1), p[:1].expand(3, -1, -1) * 0 + p[1:])
    omega = SCHEMES["rope-tv"].omega(16)
    true = rotation.cos_sin(p[1:].movedim(0, -1), omega, torch.float64)
    for ours, exact in zip((cos, sin), true, strict=True):
        assert (ours - torch.cat((exact, exact), -1)[..., 0, :]).abs().max() < 1e-7


def test_default_positions_are_those_of_text_alone(tiny):
    model = strong(tiny)
    set_rope(model, "rope-tv")
    p = positions_for(model, ["text:12"] * 2)
    assert torch.equal(logits(model), logits(model, position_ids=p))


@settings(max_examples=12)
@given(
    scheme=st.sampled_from(SERVED),
    image=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
)
def test_decoding_from_the_cache_equals_the_full_forward(tiny, scheme, image, before, after):
    model = strong(tiny)
    set_rope(model, SCHEMES[scheme].replace(pairing="half", fraction=1.0, channel_offset="start"))
    rows = [f"text:{before} image:{image[0]}x{image[1]} text:{after}", f"text:{after} video:2x2x2 text:1"]
    generate_and_compare(model, rows)


def generate_and_compare(model, rows, **options):
    p = positions_for(model, rows, padding_side="left")
    longest = p.shape[-1]
    lengths = [positions_for(model, [segments]).shape[-1] for segments in rows]
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    ids = torch.randint(3, 97, mask.shape)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        position_ids=p,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        **options,
    )
    new = out.sequences.shape[1] - longest
    whole = torch.cat((p, p[..., -1:] + torch.arange(1, new + 1)), -1)
    seen = torch.cat((mask, mask.new_ones(len(mask), new)), -1)
    full = logits(model, out.sequences, attention_mask=seen, position_ids=whole)[:, longest - 1 : -1]
    assert (torch.stack(out.logits, 1) - full).abs().max() < WITHIN


SEGMENTS = ["text:3 image:2x3 text:4", "text:2 image:3x4 text:3 video:2x2x2 text:2"]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gemma3_text", "mistral", "cohere2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_families_decode_with_every_cache(tiny, model_type, cache):
    model = strong(tiny, model_type, sliding_window=8)
    set_rope(model, "rope-tv", pairing=pairing(model))
    generate_and_compare(model, SEGMENTS, cache_implementation=cache)


def pairing(model):
    rope = rope_of(model)
    return (next(iter(rope.values())) if isinstance(rope, dict) else rope).pairing


def test_repeating_a_call_gives_the_same_result(tiny):
    model = strong(tiny)
    set_rope(model, "m-rope", axis_shares=(2, 3, 3))
    generate_and_compare(model, SEGMENTS)
    generate_and_compare(model, SEGMENTS[::-1])
    before = logits(model)
    generate_and_compare(model, SEGMENTS)
    assert torch.equal(logits(model), before)


def test_beams_follow_their_positions(tiny):
    model = strong(tiny)
    set_rope(model, "rope-tv")
    p = positions_for(model, [SEGMENTS[0]])
    ids = torch.randint(3, 97, (1, p.shape[-1]))
    run = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached, whole = (
        model.generate(input_ids=ids, position_ids=p, use_cache=use, **run) for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_a_prompt_may_come_in_chunks(tiny, cached):
    model = strong(tiny)
    set_rope(model, "rope-tv")
    p, ids = positions_for(model, [SEGMENTS[0]]), torch.randint(3, 97, (1, 13))
    full = logits(model, ids, position_ids=p)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [
        logits(model, ids[:, s], position_ids=p[..., s], **cached(cache)) for s in (slice(0, 5), slice(5, 13))
    ]
    assert (torch.cat(parts, 1) - full).abs().max() < WITHIN


def test_our_op_takes_the_place_of_the_function_in_training_too(tiny):
    model = strong(tiny)
    before, original = logits(model), copy.deepcopy(model)
    handle = use_kernels(model)
    assert (logits(model) - before).abs().max() < WITHIN
    for one in (model, original):
        one.train()
        one(IDS, labels=IDS).loss.backward()
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    handle.undo()
    assert torch.equal(logits(model.eval()), before)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_our_op_runs_and_a_second_model_does_not_see_it(tiny, monkeypatch):
    model, other = tiny("llama"), tiny("llama")
    use_kernels(model)
    calls = []
    angles = type(model.model.rotary_emb(torch.zeros(1), IDS)[0])
    monkeypatch.setattr(angles, "rotate", lambda self, q, k: calls.append(1) or (q, k))
    logits(other)
    assert not calls
    logits(model)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_use_kernels_refuses_an_unsupported_model_and_leaves_it_unchanged(tiny, dtype):
    model = strong(tiny, "nanochat").to(dtype)
    before = logits(model)
    with pytest.raises(ValueError, match="NanoChatAttention cannot rotate by our op"):
        use_kernels(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="no rope of ours"):
        unset_rope(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2", "cohere"])
def test_our_op_is_verified_in_low_precision_and_keeps_each_module_in_its_mode(tiny, model_type):
    model = strong(tiny, model_type, num_hidden_layers=8).to(torch.bfloat16).train()
    model.model.layers[0].eval()
    use_kernels(model)
    assert model.training and [layer.mlp.training for layer in model.model.layers] == [False] + [True] * 7


def test_explain_says_what_runs_where(tiny, capsys):
    model = tiny("llama")
    explain(model)
    set_rope(model, "rope-tv")
    explain(model)
    use_kernels(model)
    explain(model)
    own, ours, op = capsys.readouterr().out.splitlines()
    assert "model.rotary_emb" in own and "bit for bit" in own
    assert "layout='rope-tv'" in ours and ours.endswith("the model's own function")
    assert op.endswith("our op")


@pytest.mark.parametrize(
    ("said", "scheme", "changes"),
    [
        ("longest position", None, {}),
        ("pairs channels 'interleaved'", "flat", {"pairing": "interleaved"}),
        ("fraction 0.25 of head_dim 16 makes 2 pairs", "flat", {"fraction": 0.25}),
        ("an Omega for each head", "mixed", {}),
        ("does not count text tokens along", "flux2", {"pairing": "half"}),
        ("scheme 'rope-tw' is unknown", "rope-tw", {}),
        ("a scheme has no", "rope-tv", {"thetta": 1.0}),
        (
            "depends on the length",
            "flat",
            {"extensions": [{"rope_type": "dynamic", "factor": 2.0, "original_max_positions": 64}]},
        ),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused_and_the_model_unchanged(tiny, said, scheme, changes):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4} if scheme is None else None
    model = tiny("llama", **({"rope_parameters": rope} if rope else {}))
    before, modules = logits(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=said):
        set_rope(model, scheme or rope_of(model), **changes)
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), before)


def test_angles_that_depend_on_the_longest_position_are_refused(tiny):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    with pytest.raises(ValueError, match="rope_type 'longrope', whose angles depend on the longest position"):
        rope_of(tiny("phi3", rope_parameters=rope))


def test_a_model_of_dynamic_angles_can_be_given_a_scheme(tiny):
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    before = logits(model)
    handle = set_rope(model, "rope-tv")
    assert not torch.equal(logits(model), before)
    handle.undo()
    assert torch.equal(logits(model), before)


def test_setting_or_unsetting_a_rope_twice_is_refused(tiny):
    model = tiny("llama")
    handle = set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match="already"):
        set_rope(model, "rope-tv")
    handle.undo()
    with pytest.raises(ValueError, match="no rope of ours"):
        handle.undo()


def test_each_handle_reverts_its_own_change(tiny):
    model = strong(tiny)
    before, scheme = logits(model), set_rope(model, "rope-tv")
    ours, op = logits(model), use_kernels(model)
    with pytest.raises(ValueError, match="rotates by our op already; undo that first"):
        use_kernels(model)
    op.undo()
    assert torch.equal(logits(model), ours)
    with pytest.raises(ValueError, match="no rope of ours"):
        op.undo()
    scheme.undo()
    assert torch.equal(logits(model), before)


def test_positions_of_another_rank_are_refused(tiny):
    model = tiny("llama")
    set_rope(model, "rope-tv")
    with pytest.raises(ValueError, match=r"have 2 rows, but 3 axes need \(1 \+ 3, b, s\)"):
        logits(model, position_ids=torch.zeros(2, 2, 12))


def test_casting_the_model_does_not_change_its_angles(tiny):
    model, other = tiny("llama"), tiny("llama")
    set_rope(model, rope_of(model))
    far = torch.arange(4000, 4012)[None]
    exact = other.model.rotary_emb(torch.zeros(1), far)
    model.to(torch.bfloat16)
    ours = model.model.rotary_emb(torch.zeros(1), far)
    assert all(torch.equal(x, y) for x, y in zip(ours, exact, strict=True))
    assert model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), far)[0].dtype == torch.bfloat16


def test_a_copy_runs_and_is_undone_by_itself(tiny):
    model = tiny("llama")
    before = logits(model)
    set_rope(model, "rope-tv")
    use_kernels(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    unset_rope(other)
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("kernels", [False, True])
def test_checkpointing_with_two_forwards_before_one_backward(tiny, kernels):
    grads = []
    for checkpointing in (False, True):
        model = strong(tiny)
        set_rope(model, "rope-tv", learnable=True)
        if kernels:
            use_kernels(model)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        rows = "text:2 image:2x3 text:4", "text:2 image:3x2 text:4"
        outs = [
            model(IDS[:1], position_ids=positions_for(model, [segments]), use_cache=False).logits
            for segments in rows
        ]
        (outs[0].square().mean() + outs[1].mean()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert len(grads[0]) == 22 and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("kernels", [False, True])
def test_one_graph_serves_all_positions(tiny, kernels):
    torch._dynamo.reset()
    model = strong(tiny)
    set_rope(model, "rope-tv")
    if kernels:
        use_kernels(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for segments in ("text:2 image:2x3 text:4", "text:2 image:3x2 text:4", "text:12"):
        p = positions_for(model, [segments])
        with torch.no_grad():
            ours = compiled(IDS[:1], position_ids=p, use_cache=False).logits
        assert (ours - logits(model, IDS[:1], position_ids=p)).abs().max() < WITHIN


def test_an_exported_model_takes_positions(tiny):
    model = strong(tiny)
    set_rope(model, "rope-tv")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, p):
            return self.model(ids, position_ids=p, use_cache=False).logits

    p = positions_for(model, ["text:2 image:2x3 text:4"])
    exported = torch.export.export(Logits(), (IDS[:1], p), strict=False).module()
    other = positions_for(model, ["text:4 image:2x2 text:4"])
    with torch.no_grad():
        assert (exported(IDS[:1], other) - logits(model, IDS[:1], position_ids=other)).abs().max() < WITHIN


def test_the_trainer_learns_weights_and_omega_with_and_without_checkpointing(tiny, tmp_path):
    def losses(checkpointing):
        model = tiny("llama")
        set_rope(model, "rope-tv", learnable=True)
        use_kernels(model)
        before = model.model.rotary_emb.ropes[None].omega_param.detach().clone()
        run = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), **run, **quiet, activation_checkpointing=checkpointing)
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 8)
        trainer.train()
        assert not torch.equal(model.model.rotary_emb.ropes[None].omega_param, before)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = losses(False)
    assert plain[-1] < plain[0] and losses(True) == plain


def test_a_model_on_the_meta_device_is_read_and_changed(tiny):
    config = tiny("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert rope_of(model).scheme == SCHEMES["flat"]
    set_rope(model, "rope-tv")
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert logits(model).isfinite().all()


def test_a_learned_omega_learns(tiny):
    model = strong(tiny)
    rope = Rotary(16, Scheme(layout="rope-tv", learnable=True))
    set_rope(model, rope)
    model(IDS, labels=IDS).loss.backward()
    assert rope.omega_param.grad.abs().sum() > 0


def test_an_extension_multiplies_the_tables(tiny):
    model = tiny("llama")
    yarn = YaRN(factor=4.0, original_max_positions=64)
    set_rope(model, "flat", extensions=[yarn])
    cos, _ = model.model.rotary_emb(torch.zeros(1), IDS * 0)
    assert math.isclose(cos.max().item(), yarn.attention_scaling, rel_tol=1e-6)


def test_a_second_turn_needs_positions_where_the_first_had_them(tiny, cached):
    model = strong(tiny)
    set_rope(model, "m-rope", axis_shares=(2, 3, 3))
    p, ids = positions_for(model, [SEGMENTS[0]]), torch.randint(3, 97, (1, 13))
    full = logits(model, ids, position_ids=p)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :10], position_ids=p[..., :10]))
    with pytest.raises(ValueError, match=r"needs its own: position_ids \(1 \+ 3, b, s\)"):
        logits(model, ids[:, 10:], **cached(cache))
    second = logits(model, ids[:, 10:], **cached(cache), position_ids=p[..., 10:])
    assert (second - full[:, 10:]).abs().max() < WITHIN


def test_packed_documents_are_separated_or_refused(tiny):
    model = strong(tiny)
    set_rope(model, "rope-tv")
    rows, ids = ["text:2 image:2x2 text:1", "text:5"], torch.randint(3, 97, (1, 12))
    p = torch.cat([positions_for(model, [segments]) for segments in rows], -1)
    with pytest.raises(ValueError, match="lets the documents see one another"):
        logits(model, ids, position_ids=p)
    packed = logits(model, ids, position_ids=p, use_cache=False)
    alone = logits(model, ids[:, 7:], position_ids=p[..., 7:])
    assert (packed[:, 7:] - alone).abs().max() < WITHIN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_is_unchanged_under_its_own_rope(tiny, tmp_path, dtype):
    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    before = logits(model)
    set_rope(model, rope_of(model))
    assert before.dtype == dtype and torch.equal(logits(model), before)


def test_a_rotary_of_another_head_is_refused(tiny):
    with pytest.raises(ValueError, match="its Rotary needs that head_dim, not 8"):
        set_rope(tiny("llama"), Rotary(8, "rope-tv"))


def test_the_rope_of_another_kind_of_module_is_refused(tiny):
    rope = rope_of(tiny("gpt_neox"))
    assert isinstance(rope, ModelRope) and rope.pairs == 2
    with pytest.raises(ValueError, match=r"read from another kind of module \(tokens, 2 pairs\)"):
        set_rope(tiny("llama"), rope)


def test_layers_may_run_at_their_own_theta(tiny):
    model = strong(tiny, "gemma3_text", layer_types=["sliding_attention", "full_attention"])
    own = rope_of(model)
    assert {layer: rope.scheme.theta for layer, rope in own.items()} == {
        "full_attention": 1e6,
        "sliding_attention": 1e4,
    }
    before = logits(model)
    set_rope(
        model, {layer: SCHEMES["rope-tv"].replace(theta=rope.scheme.theta) for layer, rope in own.items()}
    )
    assert positions_for(model, SEGMENTS).shape == (4, 2, 27)
    unset_rope(model)
    set_rope(model, {layer: rope.scheme for layer, rope in own.items()})
    assert (logits(model) - before).abs().max() < WITHIN


def test_rotary_modules_in_a_list_are_refused(tiny):
    with pytest.raises(ValueError, match="keeps rotary modules in a list"):
        set_rope(tiny("granite_swa"), "rope-tv")
