import pytest
from transformers import masking_utils
from transformers.integrations import flex_attention


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention by its definition: to compile it takes a minute here and tells nothing more."""
    from torch.nn.attention import flex_attention as torch_flex

    make_blocks = lambda *args, _compile, **kwargs: torch_flex.create_block_mask(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masking_utils, "create_block_mask", make_blocks)
    attend = lambda *args, training, **kwargs: torch_flex.flex_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", attend)
