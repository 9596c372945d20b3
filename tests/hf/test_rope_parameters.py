import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from rope_mm import SCHEMES, Image, Rotary, Scheme, from_hf_config, to_rope_parameters
from rope_mm.hf.infer_scheme import rotary_modules
from rope_mm.hf.rope_parameters import FAMILIES, read_head_dim

# what defaults leave out; theta is always another one than the default
SETTINGS = {
    "gptj": {"n_embd": 32, "n_head": 2, "rotary_dim": 8},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.25},
    "phi3": {"partial_rotary_factor": 0.75},
    "glm4_moe": {"head_dim": 64},
    "glm4v_text": {"partial_rotary_factor": 0.5},
    "deepseek_v2": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 24},
    "deepseek_v3": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 24},
    "qwen3_vl_text": {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [20, 22, 22]}},
    "qwen2_vl_text": {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}},
    "ernie4_5_vl_moe_text": {"rope_scaling": {"mrope_section": [24, 24, 16]}},
    "qwen3_vl_vision": {"spatial_merge_size": 4},
    "llama4_vision_model": {"image_size": 56},
}
NESTED = {"gemma3_text", "gemma3n_text", "gemma4_text", "olmo3"}
VISION = [
    name for name, base in FAMILIES.items() if set(base.axes) == {"t", "y", "x"} and base.ladder != "shared"
]
TEXT = [
    (name, kind)
    for name in FAMILIES
    if name not in VISION
    for kind in (("full_attention", "sliding_attention") if name in NESTED else (None,))
]


def make_config(model_type):
    theta = {} if model_type in {"gptj", *NESTED} else {"rope_theta": 5_000.0}
    return AutoConfig.for_model(model_type, **theta, **SETTINGS.get(model_type, {}))


def modeling(config):
    return importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))


def rotary_of(config):
    """The family's own rotary module: the one class that is neither another tower's nor a layer's."""
    module = modeling(config)
    classes = [name for name in vars(module) if name.endswith(("RotaryEmbedding", "RopePositionEmbedding"))]
    kind = type(config).__name__.removesuffix("Config")
    tower = "Vision" in kind or "ViT" in kind
    mine = [name for name in classes if ("Vision" in name or "ViT" in name) == tower and "DiT" not in name]
    (name,) = [name for name in mine if "Audio" not in name]
    return getattr(module, name)(config).eval()  # DINOv3's shifts positions in training


def gptj(config, q, k, positions):
    module = modeling(config)
    table = module.create_sinusoidal_positions(64, config.rotary_dim)[positions]
    sin, cos = table.chunk(2, dim=-1)
    n = config.rotary_dim

    def turned(x):
        x = x.transpose(1, 2)
        return torch.cat((module.apply_rotary_pos_emb(x[..., :n], sin, cos), x[..., n:]), -1).transpose(1, 2)

    return turned(q), turned(k)


def both(apply):
    return lambda q, k, cos, sin: (apply(q, cos, sin, unsqueeze_dim=1), apply(k, cos, sin, unsqueeze_dim=1))


def complex_pairs(module):
    heads_second = module.__name__.endswith("llama4")

    def apply(q, k, table):
        q, k = (x.transpose(1, 2) if heads_second else x for x in (q, k))
        q, k = module.apply_rotary_emb(q, k, table)
        return (q.transpose(1, 2), k.transpose(1, 2)) if heads_second else (q, k)

    return apply


def their_apply(config):
    """What turns q and k (b, h, s, d) by the module's tables."""
    module = modeling(config)
    if config.model_type in ("llama4_text", "deepseek_v2"):
        return complex_pairs(module)
    if config.model_type in ("gemma3n_text", "gemma4_text"):
        return both(module.apply_rotary_pos_emb)
    if config.model_type == "deepseek_v3" and config.rope_interleave:
        return module.apply_rotary_pos_emb_interleave
    return module.apply_rotary_pos_emb


def their_heads(config, q, k, positions, layer_type):
    """q and k (b, h, s, d) as the family's own code turns them at positions (1, s) or (3, 1, s)."""
    if config.model_type == "gptj":
        return gptj(config, q, k, positions)
    tables = rotary_of(config)(q, positions, *([layer_type] if layer_type else []))
    tables = tables if isinstance(tables, tuple) else (tables,)
    width = tables[0].shape[-1] * (2 if tables[0].is_complex() or config.model_type == "gpt_oss" else 1)
    tail = hasattr(config, "qk_rope_head_dim")  # others split their heads in the same place
    parts = [
        x.split((x.shape[-1] - width, width) if tail else (width, x.shape[-1] - width), -1) for x in (q, k)
    ]
    turned = their_apply(config)(*(part[1 if tail else 0] for part in parts), *tables)
    still = [part[0 if tail else 1] for part in parts]
    return tuple(torch.cat((a, b), -1) for a, b in zip(turned, still, strict=True))


@pytest.mark.parametrize(("model_type", "layer_type"), TEXT)
def test_scores_are_those_of_the_familys_own_rotary_module(model_type, layer_type):
    config = make_config(model_type)
    scheme, head_dim = from_hf_config(config, layer_type), read_head_dim(config, layer_type)
    rope, axes = Rotary(head_dim, scheme), len(scheme.axes)
    positions = torch.randint(0, 50, (9, axes))
    q, k = (torch.nn.functional.normalize(torch.randn(1, 2, 9, head_dim).double(), dim=-1) for _ in "qk")
    theirs_q, theirs_k = their_heads(
        config, q, k, positions.T[:, None] if axes > 1 else positions.T, layer_type
    )
    ours_q, ours_k = rope(q.transpose(1, 2), k.transpose(1, 2), positions.double())
    ours = torch.einsum("bihd,bjhd->bhij", ours_q, ours_k)
    # their angles are float32: 50 * 2**-24 rad of 1
    torch.testing.assert_close(ours, (theirs_q @ theirs_k.mT).double(), rtol=0, atol=4e-6)
    assert (ours - q @ k.mT).abs().max() > 1e-2


def their_table(config, y, x):
    """Cosine and sine (y * x, d) of an image's patches, row by row."""
    rotary, noise = rotary_of(config), torch.zeros(1, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij")
    if config.model_type == "dinov3_vit":
        return rotary(torch.zeros(1, 3, y * config.patch_size, x * config.patch_size))
    if config.model_type == "llama4_vision_model":  # its last row is the class token
        table = rotary(noise)[:-1, 0].repeat_interleave(2, -1)
        return table.real, table.imag
    first = (columns, rows) if config.model_type in ("sam3_vit_model", "gemma4_vision") else (rows, columns)
    positions = torch.stack([z.flatten() for z in first], -1)
    tables = rotary(noise, positions[None] if config.model_type == "gemma4_vision" else positions)
    return [table.reshape(y * x, -1) for table in tables]


@pytest.mark.parametrize("model_type", VISION)
def test_cosine_and_sine_are_those_of_the_familys_own_rotary_module(model_type):
    config = make_config(model_type)
    scheme, head_dim = from_hf_config(config), read_head_dim(config)
    rope = Rotary(head_dim, scheme.replace(options=[o for o in scheme.options if o[0] != "merge"]))
    positions, _ = rope.place([Image(4, 4)])
    ours, theirs = rope.cos_sin(positions), their_table(config, 4, 4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=2e-6)


@given(st.integers(1, 300), st.data())
def test_a_fraction_n_of_d_pairs_rotates_n_pairs_despite_rounding(pairs, data):
    n = data.draw(st.integers(1, pairs))
    assert Scheme(layout="flat", fraction=n / pairs).pairs(2 * pairs) == n
    turning = Scheme(layout="flat", unrotated_fraction=1 - n / pairs).omega(2 * pairs)
    assert turning.count_nonzero() == n


EXTENDED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "truncate": False},
    "yarn, DeepSeek's": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn, its own attention": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
    "longrope, factor from lengths": {
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
    },
    "proportional": {"partial_rotary_factor": 0.3},
    "proportional, stretched": {"partial_rotary_factor": 0.7, "factor": 2.0},
    "default": {},
}


def extended(name, **more):
    rope = {"rope_type": name.split(",")[0], "rope_theta": 5_000.0, **EXTENDED[name]}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 48}
    return AutoConfig.for_model("llama", **sizes, rope_parameters=rope, **more)


@pytest.mark.parametrize("length", [20, 60])
@pytest.mark.parametrize("name", EXTENDED)
def test_every_rope_type_is_read(name, length):
    config = extended(name)
    positions = torch.randint(0, length, (9,))
    positions[0] = length - 1
    theirs = rotary_of(config)(torch.zeros(1), positions[None])
    ours = Rotary(16, from_hf_config(config)).cos_sin(positions[:, None])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other[0], rtol=0, atol=6e-6)


@pytest.mark.parametrize("name", EXTENDED)
def test_rope_parameters_say_what_was_read(name):
    config = extended(name)
    scheme = from_hf_config(config)
    config.rope_parameters = json.loads(json.dumps(to_rope_parameters(scheme)))
    again = from_hf_config(config)
    assert again.replace(unrotated_fraction=scheme.unrotated_fraction) == scheme
    assert again.unrotated_fraction == pytest.approx(scheme.unrotated_fraction)
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    torch.testing.assert_close(again.omega(16, length=60), scheme.omega(16, length=60), rtol=0, atol=0)


@pytest.mark.parametrize(("model_type", "layer_type"), [*TEXT, *((name, None) for name in VISION)])
def test_every_family_comes_back_from_its_own_rope_parameters(model_type, layer_type):
    config = make_config(model_type)
    scheme, head_dim = from_hf_config(config, layer_type), read_head_dim(config, layer_type)
    said = json.loads(json.dumps(to_rope_parameters(scheme, head_dim)))
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {**config.rope_parameters, layer_type: said} if layer_type else said
    assert from_hf_config(config, layer_type) == scheme


def test_transformers_rotates_by_what_we_say():
    scheme = SCHEMES["m-rope-qwen2-vl"].replace(
        extensions=[{"rope_type": "yarn", "factor": 4.0, "original_max_positions": 32.0}]
    )
    said = to_rope_parameters(scheme, head_dim=32)
    assert said["mrope_section"] == [4, 6, 6]
    config = AutoConfig.for_model(
        "qwen2_vl_text", hidden_size=64, num_attention_heads=2, rope_parameters=said
    )
    positions = torch.randint(0, 50, (9, 3))
    theirs = rotary_of(config)(torch.zeros(1), positions.T[:, None])
    for one, other in zip(Rotary(32, scheme).cos_sin(positions), theirs, strict=True):
        torch.testing.assert_close(one, other[0], rtol=0, atol=6e-6)


def test_a_composite_config_is_read_for_its_text():
    config = AutoConfig.for_model("qwen2_5_vl", vision_config={"tokens_per_second": 4})
    scheme = from_hf_config(config)
    assert dict(scheme.options) == {"rate": 4.0}
    assert scheme.replace(options=SCHEMES["m-rope-qwen2.5-vl"].options) == SCHEMES[
        "m-rope-qwen2.5-vl"
    ].replace(axis_shares=(16, 24, 24))
    assert read_head_dim(config) == 128
    assert from_hf_config(config.vision_config).layout == "grid"
    thinker = AutoConfig.for_model("qwen2_5_omni_thinker")
    assert from_hf_config(thinker).layout == "tm-rope"
    gemma = AutoConfig.for_model("gemma3")
    assert from_hf_config(gemma, "sliding_attention").theta == 1e4
    assert from_hf_config(gemma, "full_attention").theta == 1e6


def test_deepseek_without_interleaving_is_half():
    config = AutoConfig.for_model("deepseek_v3", rope_interleave=False)
    scheme = from_hf_config(config)
    assert (scheme.pairing, scheme.channel_offset, scheme.fraction * read_head_dim(config)) == (
        "half",
        "end",
        64,
    )
    q, k = torch.randn(2, 1, 2, 5, 192).double()
    positions = torch.arange(5)[None]
    theirs_q, theirs_k = their_heads(config, q, k, positions, None)
    ours = Rotary(192, scheme)(q.transpose(1, 2), k.transpose(1, 2), positions.T)
    scores = torch.einsum("bihd,bjhd->bhij", *ours)
    torch.testing.assert_close(scores, theirs_q @ theirs_k.mT, rtol=0, atol=1e-4)


def test_rope_parameters_are_read_without_transformers():
    old = SimpleNamespace(
        model_type="llama",
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_theta=5e5,
        rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        original_max_position_embeddings=32,
    )
    (longrope,) = from_hf_config(old).extensions
    assert (longrope.original_max_positions, longrope.factor, from_hf_config(old).theta) == (32, 4.0, 5e5)


def plain(**entries):
    return SimpleNamespace(**{"model_type": "llama", "head_dim": 8, **entries})


UNREADABLE = {
    "model_type 'bert' is unknown; .*FAMILIES.* lists all": (plain(model_type="bert"), None),
    "did you mean 'qwen3'": (plain(model_type="qwen33"), None),
    "give layer_type, one of": (lambda: AutoConfig.for_model("gemma3_text"), None),
    "layer_type 'full' is unknown; there are: sliding_attention": (
        lambda: AutoConfig.for_model("gemma3_text"),
        "full",
    ),
    "there are: none": (plain(), "full_attention"),
    "layers of type 'nope' are not rotated": (
        plain(layer_types=["nope", "full"], rope_parameters={"nope": None, "full": {}}),
        "nope",
    ),
    "has no head_dim": (SimpleNamespace(model_type="llama"), None),
    "21 of 42 channels": (plain(head_dim=42, rope_parameters={"partial_rotary_factor": 0.5}), None),
    "transformers has no rope_type 'yam'": (plain(rope_parameters={"rope_type": "yam"}), None),
    "yarn takes": (plain(rope_parameters={"rope_type": "yarn", "factor": 2.0}), None),
    r"mrope_section \[1, 1, 1\] must sum to the 4": (
        plain(model_type="qwen2_vl_text", rope_parameters={"mrope_section": [1, 1, 1]}),
        None,
    ),
    "mrope_interleaved is True": (
        plain(
            model_type="qwen2_vl_text",
            rope_parameters={"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        ),
        None,
    ),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_config_that_says_too_little_or_too_much_is_refused(message):
    config, layer_type = UNREADABLE[message]
    with pytest.raises(ValueError, match=message):
        from_hf_config(config() if callable(config) else config, layer_type)


UNSAID = {
    "spacing='log'": SCHEMES["pixel-log"],
    "layout='rope-tv'": SCHEMES["rope-tv"],
    "attention_factor=1.5": SCHEMES["flat"].replace(attention_factor=1.5),
    "pairing='block'": SCHEMES["pixtral"].replace(pairing="block"),
    "give head_dim": SCHEMES["m-rope"],
    "NTK": SCHEMES["flat"].replace(extensions=[{"rope_type": "ntk", "factor": 2.0}]),
    "axes=": SCHEMES["m-rope"].replace(extensions=[{"rope_type": "linear", "factor": 2.0, "axes": ["y"]}]),
    "unrotated_fraction=0.75": SCHEMES["p-rope"].replace(
        extensions=[{"rope_type": "yarn", "factor": 2.0, "original_max_positions": 8.0}]
    ),
}


@pytest.mark.parametrize("message", UNSAID)
def test_what_rope_parameters_cannot_say_is_named(message):
    with pytest.raises(ValueError, match=message):
        to_rope_parameters(UNSAID[message])


LIVE = ["arcee", "apertus", "seed_oss", "glm_ocr_text", "hunyuan_v1_dense", "helium"]


@pytest.mark.parametrize("model_type", LIVE)
def test_a_config_that_no_table_names_is_read_from_its_rotary_module(model_type):
    config = AutoConfig.for_model(model_type)
    (module,) = rotary_modules(config)
    scheme = from_hf_config(config)
    theirs = module.inv_freq.double()
    omega = scheme.omega(read_head_dim(config)).amax(0)
    assert model_type not in FAMILIES
    assert torch.allclose(omega, theirs, rtol=1e-5)


@pytest.mark.parametrize("given", ["llama", {"rope_theta": 1e4}, None, torch.nn.Linear(1, 1)])
def test_what_is_no_config_and_no_scheme_is_refused(given):
    with pytest.raises(ValueError, match=r"has no model_type; give a config, such as model\.config"):
        from_hf_config(given)
    with pytest.raises(ValueError, match=r"scheme is a .*; give a Scheme, such as SCHEMES"):
        to_rope_parameters(given)
