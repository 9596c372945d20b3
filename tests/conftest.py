"""One thread, fixed seeds and few examples: on small tensors more threads wait longer than they work."""

import pytest
import torch
from hypothesis import settings

# the same examples every time: whoever lands a change is not stopped by a number that nobody drew before;
# `pytest --hypothesis-profile default` draws new ones
settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention by its definition: to compile it takes a minute here and tells nothing more."""
    from torch.nn.attention import flex_attention as torch_flex
    from transformers import masking_utils
    from transformers.integrations import flex_attention

    make_blocks = lambda *args, _compile, **kwargs: torch_flex.create_block_mask(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masking_utils, "create_block_mask", make_blocks)
    attend = lambda *args, training, **kwargs: torch_flex.flex_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", attend)


@pytest.fixture
def cached():
    """A function: cache -> the keyword argument that holds it in this version of transformers."""
    from transformers import GenerationMixin

    from rope_mm.checks.arguments import spelling

    name = spelling(GenerationMixin.prepare_inputs_for_generation, "cache")
    assert name is not None
    return lambda cache: {name: cache}


@pytest.fixture(params=[2, 3])
def flash(request, monkeypatch):
    """flash-attn 2 and 3 by plain torch: how to switch a model to it, and the calls that were made."""
    from flash_attn_functions import install

    return install(monkeypatch, request.param)
