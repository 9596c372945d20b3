"""EVA and RoPE-ViT of timm under their own rope and under others, loaded without torchvision."""

import copy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from rope_mm import place
from rope_mm.hf import explain, rope_of, set_rope, unset_rope
from rope_mm.schemes.extensions import NTK

PEERS = Path(sys.prefix) / "peers"  # where `make` puts timm: beside the environment's packages
pytestmark = pytest.mark.skipif(not (PEERS / "timm").is_dir(), reason=f"no timm in {PEERS}")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
EVA = SIZES | {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
KINDS = {
    "eva-02": EVA | {"ref_feat_shape": (2, 2), "qkv_fused": False},
    "rope-vit": EVA | {"rope_grid_indexing": "xy", "rope_temperature": 100.0, "attn_type": "rope"},
    "from one": EVA | {"rope_grid_indexing": "xy", "rope_grid_offset": 1.0, "attn_type": "rope"},
    "dinov3": EVA | {"rope_type": "dinov3", "attn_type": "rope", "rope_rotate_half": True},
    "mixed": EVA | {"rope_type": "mixed", "attn_type": "rope"},
    "halves": EVA | {"rope_rotate_half": True, "dynamic_img_size": True},
}


SERVED = [name for name in KINDS if name not in ("dinov3", "mixed")]


def packages():
    """timm and its rooms without what their `__init__` imports, and what its layers need of torchvision."""
    made = {name: ModuleType(name) for name in ("timm", "timm.models", "timm.data")}
    for name, module in made.items():
        module.__path__ = [str(PEERS.joinpath(*name.split(".")))]
    made["torchvision.ops.misc"] = misc = ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = nn.BatchNorm2d
    made["timm"].__version__ = "1.0"
    return made | {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}


@pytest.fixture(scope="module")
def eva():
    """`eva("halves")`: a tiny random EVA of timm; no other test gets to see timm, or torchvision's names."""
    before = set(sys.modules)
    sys.modules |= packages()
    try:
        vars(sys.modules["timm.data"]).update(vars(import_module("timm.data.constants")))
        kind = import_module("timm.models.eva").Eva
        vit = import_module("timm.models.vision_transformer").VisionTransformer

        def make(name):
            torch.manual_seed(0)
            model = (kind(**KINDS[name]) if name in KINDS else vit(**SIZES)).eval()
            for p in model.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.2)
            return model

        yield make
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


def run(model, images):
    with torch.no_grad():
        return model(images)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SERVED)
def test_a_model_is_unchanged_to_the_bit_by_its_own_rope_and_after_undo(eva, images, name):
    model = eva(name)
    before, rope = run(model, images), rope_of(model)
    assert rope.error == 0 and rope.pairing == ("half" if name == "halves" else "interleaved")
    handle = set_rope(model, rope)
    assert torch.equal(run(model, images), before)
    handle.undo()
    set_rope(model, rope.scheme, theta=7.0)
    assert (run(model, images) - before).abs().max() > 1e-3 * before.abs().max()
    unset_rope(model)
    assert torch.equal(run(model, images), before) and "get_embed" not in vars(model.rope)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(
    ("scheme", "extensions"), [("rope-tv", ()), ("grid", ()), ("grid", (NTK(factor=2.0, axes=("y", "x")),))]
)
def test_a_scheme_gives_what_its_tables_in_float64_give(eva, images, name, scheme, extensions):
    model = eva(name)
    truth, rotary = copy.deepcopy(model), set_rope(model, scheme, extensions=extensions).slots[0][0]
    angle = place("image:4x4", rotary.rope.scheme.layout)[0] @ rotary.rope.scheme.omega(24)
    once = (angle.sin(), angle.cos())
    both = [torch.cat((x, x), -1) if name == "halves" else x.repeat_interleave(2, -1) for x in once]
    truth.rope.get_embed = lambda shape=None, dtype=None: torch.cat(both, -1).float()
    assert (run(model, images) - run(truth, images)).abs().max() <= 1e-5


def test_images_of_other_sizes_are_placed_by_their_own_rows_and_columns(eva):
    model, images = eva("halves"), torch.randn(1, 3, 16, 48)
    truth, scheme = copy.deepcopy(model), rope_of(model).scheme.replace(theta=7.0)
    set_rope(model, scheme)
    truth.rope.temperature = 7.0
    truth.rope.bands.copy_(truth.rope._compute_bands())
    assert (run(model, images) - run(truth, images)).abs().max() <= 1e-5


def test_a_learned_omega_gets_gradients_and_training_that_moves_coordinates_is_refused(eva, images):
    model = eva("rope-vit").train()
    set_rope(model, "rope-vit-axial", learnable=True)
    model(images).square().mean().backward()
    assert model.rope_mm.learned[0].omega_param.grad.abs().max() > 0
    model.rope.aug_active = True
    with pytest.raises(ValueError, match="training would move the coordinates of RotaryEmbeddingCat"):
        model(images)


def test_explain_names_the_rope_and_models_of_other_ropes_or_none_are_refused(eva, capsys):
    explain(eva("eva-02"))
    assert capsys.readouterr().out.startswith(
        "rope: the model's own, bit for bit (Scheme(layout='fixed-extent'"
    )
    refused = {"vit": "VisionTransformer has no part that is known to make tables",
               "mixed": "Eva rotates by RotaryEmbeddingMixed, and is not served",
               "dinov3": "Eva rotates by RotaryEmbeddingDinoV3, and is not served"}  # fmt: skip
    for name, match in refused.items():
        with pytest.raises(ValueError, match=match):
            set_rope(eva(name), "grid")
