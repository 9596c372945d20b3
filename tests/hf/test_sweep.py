"""One family after another: unchanged by its own rope, decoding as its forward does, trained by our op."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rope_mm.hf import positions_for, rope_of, set_rope, use_kernels

FAMILIES = [
    "afmoe",
    "apertus",
    "arcee",
    "bitnet",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "llama4_text",
    "ministral",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]
COMPLEX = {"deepseek_v2", "llama4_text"}  # these multiply by complex numbers, which our op is no place for
IDS = torch.arange(3, 27).view(2, 12)
SEGMENTS = ["text:3 image:2x3 text:4", "text:1 image:3x2 text:6"]


def ropes(model):
    found = rope_of(model)
    return list(found.values()) if isinstance(found, dict) else [found]


def identity(model, **use):
    """Largest difference in logits that a model's own rope makes, and whether ours was called."""
    called = []
    with torch.no_grad():
        before = model(IDS, **use).logits
        handle = set_rope(model, rope_of(model))
        for module in model.modules():
            if hasattr(module, "ropes"):
                module.register_forward_hook(lambda *_: called.append(1))
        after = model(IDS, **use).logits
        handle.undo()
        assert torch.equal(model(IDS, **use).logits, before)
    return (after - before).abs().max().item(), bool(called)


def decoding(model):
    """Largest difference between generate with a cache and one forward, with images on three axes."""
    handle = set_rope(model, "rope-tv", pairing=ropes(model)[0].pairing)
    p = positions_for(model, SEGMENTS)
    ids = torch.randint(3, 97, (2, 13))
    run = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(input_ids=ids, position_ids=p, output_logits=True, **run)
    whole = torch.cat((p, p[..., -1:] + torch.arange(1, 5)), -1)
    with torch.no_grad():
        full = model(out.sequences, position_ids=whole, use_cache=False).logits[:, 12:-1]
    handle.undo()
    return (torch.stack(out.logits, 1) - full).abs().max().item()


def compiling(model):
    """Graphs of forwards with images at one place, then at another, and the largest difference to eager."""
    handle = set_rope(model, "rope-tv", pairing=ropes(model)[0].pairing)
    torch._dynamo.reset()
    counter, far, graphs = CompileCounter(), 0.0, []
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (SEGMENTS, SEGMENTS[::-1]):
        run = {"position_ids": positions_for(model, rows), "use_cache": False}
        ids = torch.randint(3, 97, (2, 13))
        with torch.no_grad():
            far = max(far, (compiled(ids, **run).logits - model(ids, **run).logits).abs().max().item())
        graphs.append(counter.frame_count)
    handle.undo()
    return graphs, far


def training(model):
    """Whether our op rotates there and gradients come; the reason if it does not."""
    try:
        handle = use_kernels(model)
    except ValueError as error:
        return str(error)
    model.train()(IDS).logits.square().mean().backward()
    handle.undo()
    return (
        "yes" if all(p.grad is None or p.grad.isfinite().all() for p in model.eval().parameters()) else "no"
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_by_name(tiny, families, model_type):
    model = tiny(model_type, initializer_range=0.1)
    error, called = identity(model)
    assert error == 0 and called
    far = decoding(model)
    assert far < 1e-4
    graphs, compiled = compiling(model)
    # one graph of the model; torch compiles the hook of the outermost forward, which splits positions, alone
    assert graphs in ([1, 1], [2, 2]) and compiled < 1e-4
    op = training(model)
    families[model_type] = error, far, compiled, "yes" if op == "yes" else "refused"
    assert (op == "yes") == (model_type not in COMPLEX), op


def test_the_page_of_families_has_a_row_for_each_within_these_bounds(families_page):
    rows = {
        name: (float(own), float(far), float(compiled), op) for name, own, far, compiled, op in families_page
    }
    assert list(rows) == sorted(FAMILIES), "write it anew: pytest tests/hf --write-families"
    for name, (own, far, compiled, op) in rows.items():
        assert own == 0
        assert max(far, compiled) < 1e-4
        assert op == ("refused" if name in COMPLEX else "yes")


@pytest.mark.slow
def test_every_causal_model_with_rotary_is_unchanged_by_its_own_rope(tiny):
    served, refused = {}, {}
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        try:
            model = tiny(model_type)
            with torch.no_grad():
                model(IDS, use_cache=False)
        except Exception as error:  # what its sizes cannot be is not our matter
            refused[model_type] = error
            continue
        try:
            served[model_type] = identity(model, use_cache=False)
        except ValueError as error:
            refused[model_type] = error
    unlike = {name: error for name, (error, called) in served.items() if called and error}
    assert unlike == {}
    assert sum(called for _, called in served.values()) >= 100
