"""Schemes in the configs of diffusers' models: saved with the model, and set again by one line."""

import pytest
import torch

from rope_mm.hf import rope_of, set_rope

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_a_scheme_is_saved_in_the_config_and_set_rope_brings_it_back(tiny_diffusers, name, tmp_path):
    model, inputs = tiny_diffusers(name)
    config, plain = dict(model.config), model(**inputs)[0]
    handle = set_rope(model, "rope-tv", theta=50.0)
    after = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert (loaded(**inputs)[0] - plain).abs().max() < 1e-5 * plain.abs().max()
    set_rope(loaded)
    assert rope_of(loaded).scheme.theta == 50.0
    assert (loaded(**inputs)[0] - after).abs().max() < 1e-5 * after.abs().max()
    assert (after - plain).abs().max() > 1e-2 * plain.abs().max()
    handle.undo()
    assert dict(model.config) == config


def test_its_own_rope_is_not_saved_in_the_config(tiny_diffusers):
    model, _ = tiny_diffusers("Flux")
    config = dict(model.config)
    set_rope(model, rope_of(model))
    assert dict(model.config) == config


def test_a_learned_omega_that_diffusers_does_not_load_is_refused(tiny_diffusers, tmp_path):
    model, _ = tiny_diffusers("Flux")
    set_rope(model, "rope-tv", learnable=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved with a learned Omega, which diffusers does not load"):
        set_rope(loaded)
