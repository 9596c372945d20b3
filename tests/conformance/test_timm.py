"""Our schemes against timm's rotary modules, the one file of timm that needs no torchvision."""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_embedding_torch import RotaryEmbedding

from rope_mm import Image, Rotary
from rope_mm.positions.place import augment_positions

# where `make` puts timm: beside the environment's packages, not among them
PEERS = Path(sys.prefix) / "peers"
SIZES = st.integers(1, 6)
few = settings(max_examples=10, deadline=None)
# timm makes angles of up to 40 radians in float32, and of up to 352 for pixels, where neighbours are 3e-5
# apart; q and k are of up to 5
SINGLE, PIXELS = 1e-5, 2e-4


def load_timm():
    """timm.layers.pos_embed_sincos alone, below bare packages: `import timm` itself wants torchvision."""
    spec = PathFinder.find_spec("timm", [str(PEERS), *sys.path])
    assert spec and spec.submodule_search_locations, f"pip install --no-deps --target {PEERS} timm"
    root = Path(spec.submodule_search_locations[0])
    package, layers = ModuleType("timm"), ModuleType("timm.layers")
    package.__path__, layers.__path__ = [str(root)], [str(root / "layers")]
    sys.modules |= {"timm": package, "timm.layers": layers}
    try:
        return importlib.import_module("timm.layers.pos_embed_sincos")
    finally:  # nobody else is to take these for timm
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]


timm = load_timm()


@pytest.fixture(scope="session")
def same(agree):
    """cos, sin and then q, k of a scheme on an image's patches, and those of timm's table (s, 2d)."""

    def same(scheme, rope, positions, name, table, within, half=False):
        sin, cos = table.chunk(2, -1)
        if rope.heads is None:
            ours = torch.stack(rope.cos_sin(positions))
            agree(scheme, f"timm {name}", ours, torch.stack((cos, sin)), within, "cos, sin")
        q, k = torch.randn(2, 1, len(positions), rope.heads or 2, rope.head_dim)
        theirs = [
            timm.apply_rot_embed_cat(x.transpose(1, 2), table, half=half).transpose(1, 2) for x in (q, k)
        ]
        ours = torch.stack(rope(q, k, positions))
        agree(scheme, f"timm {name}", ours, torch.stack(theirs), within, "q, k")

    return same


@few
@given(y=SIZES, x=SIZES)
def test_eva_02_is_cat_in_the_extent_of_its_training(same, y, x):
    rope = Rotary(32, "eva-02")
    table = timm.RotaryEmbeddingCat(32, in_pixels=False, ref_feat_shape=[16, 16]).get_embed([y, x])
    same("eva-02", rope, rope.place([Image(y, x)])[0], "RotaryEmbeddingCat", table, SINGLE)


@few
@given(y=SIZES, x=SIZES)
def test_pixel_log_is_cat_in_pixels(same, y, x):
    rope = Rotary(32, "pixel-log")
    table = timm.RotaryEmbeddingCat(32, in_pixels=True).get_embed([y, x])
    same("pixel-log", rope, rope.place([Image(y, x)])[0], "RotaryEmbeddingCat (pixels)", table, PIXELS)


@few
@given(y=SIZES, x=SIZES)
def test_rope_vit_axial_is_cat_with_columns_first(same, y, x):
    rope = Rotary(32, "rope-vit-axial")
    original = timm.RotaryEmbeddingCat(32, in_pixels=False, temperature=100.0, grid_indexing="xy")
    name, table = "RotaryEmbeddingCat (xy)", original.get_embed([y, x])
    same("rope-vit-axial", rope, rope.place([Image(y, x)])[0], name, table, SINGLE)


def mixed_in_timm(heads):
    """timm's module and its Omega as ours (h, 3, r): it names columns first, and a image has no time."""
    mixed = timm.RotaryEmbeddingMixed(16 * heads, depth=1, num_heads=heads)
    x, y = mixed.freqs.detach()[:, 0]
    return mixed, torch.stack((torch.zeros_like(x), y, x), 1)


@few
@given(y=SIZES, x=SIZES, heads=st.sampled_from([1, 3]))
def test_rope_vit_mixed_with_timms_parameter(same, y, x, heads):
    rope = Rotary(16, "rope-vit-mixed", heads=heads)
    mixed, omega = mixed_in_timm(heads)
    rope.load_state_dict({"omega_param": omega})
    table = mixed.get_embed([y, x])[0].detach()
    same("rope-vit-mixed", rope, rope.place([Image(y, x)])[0], "RotaryEmbeddingMixed", table, SINGLE)


def test_rope_vit_mixed_starts_as_timms_but_for_a_turn_or_mirror_of_each_head():
    """Lengths and angles between the directions of pairs are the same, and nothing else matters."""
    ours, (_, theirs) = Rotary(16, "rope-vit-mixed", heads=4).omega.detach(), mixed_in_timm(4)
    torch.testing.assert_close(ours.mT @ ours, theirs.mT @ theirs, rtol=0, atol=1e-6)


@few
@given(y=SIZES, x=SIZES, norm=st.sampled_from(["separate", "min", "max"]))
def test_dinov3_and_its_three_norms(same, y, x, norm):
    rope = Rotary(32, "dinov3", options=(("norm", norm),))
    table = timm.RotaryEmbeddingDinoV3(32, normalize_coords=norm).get_embed([y, x])
    same("dinov3", rope, rope.place([Image(y, x)])[0], "RotaryEmbeddingDinoV3", table, SINGLE, half=True)


@few
@given(y=SIZES, x=SIZES, periods=st.tuples(st.floats(0.5, 1), st.floats(2, 50)))
def test_dinov3_between_two_periods(same, y, x, periods):
    band = tuple(1 / period for period in periods)
    rope = Rotary(32, "dinov3", spacing="log", freq_range=band)
    shortest, longest = periods
    original = timm.RotaryEmbeddingDinoV3(32, temperature=None, min_period=shortest, max_period=longest)
    name = "RotaryEmbeddingDinoV3 (periods)"
    same("dinov3", rope, rope.place([Image(y, x)])[0], name, original.get_embed([y, x]), SINGLE, half=True)


@few
@given(
    y=SIZES,
    x=SIZES,
    shift=st.floats(0, 1),
    jitter=st.floats(1, 2),
    rescale=st.floats(1, 2),
    seed=st.integers(0, 99),
)
def test_augment_draws_what_timm_draws(agree, y, x, shift, jitter, rescale, seed):
    positions = Rotary(32, "dinov3").place([Image(y, x)])[0][:, 1:]
    torch.manual_seed(seed)
    theirs = timm._apply_coord_augs(positions, shift, jitter, rescale)
    ours = augment_positions(positions, shift, jitter, rescale, torch.Generator().manual_seed(seed))
    agree("dinov3", "timm _apply_coord_augs", ours, theirs, 1e-6, "positions")


@few
@given(y=SIZES, x=SIZES)
def test_genlip(same, y, x):
    rope = Rotary(64, "genlip")
    table = timm.RotaryEmbeddingMRope(64).get_embed([y, x])
    same("genlip", rope, rope.place([Image(y, x)])[0], "RotaryEmbeddingMRope", table, SINGLE, half=True)


def test_pixels_of_timm_are_not_those_of_rotary_embedding_torch():
    """Both are called "pixel": one in equal ratios, one in equal steps, the same at both ends alone."""
    ratios = timm.RotaryEmbeddingCat(32, in_pixels=True, max_res=224).bands
    steps = RotaryEmbedding(16, freqs_for="pixel", max_freq=224).freqs.detach()
    torch.testing.assert_close(ratios[[0, -1]], steps[[0, -1]])
    assert (steps[1:-1] > 1.2 * ratios[1:-1]).all()
