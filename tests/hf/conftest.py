"""Tiny random models of transformers and diffusers, and the tables of docs/models.md made with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers_models import DIFFUSERS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rope_mm.analysis import markdown

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

ROWS: dict[str, tuple[float, float, float, str]] = {}
PLAIN: dict[str, tuple[float | None, str, str]] = {}
DIFFUSERS_ROWS: dict[str, tuple[str, ...]] = {}

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 24,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-families", action="store_true", help="write the table of docs/models.md")


def pytest_configure() -> None:
    transformers.logging.set_verbosity_error()


def tiny_config(model_type: str, **more: Any) -> Any:
    """The text config of a model type, every size small."""
    default = AutoConfig.for_model(model_type).get_text_config()
    sizes = SIZES | (LATENT if hasattr(default, "qk_rope_head_dim") else {}) | more
    known = {f.name for f in dataclasses.fields(default)} | set(default.to_dict())
    return type(default)(**{name: size for name, size in sizes.items() if name in known})


def tiny_model(model_type: str, **more: Any) -> PreTrainedModel:
    """A causal language model of this type with random weights."""
    config = tiny_config(model_type, **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3e7:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tiny():
    """`tiny("llama")`: a small causal language model of this type."""
    return tiny_model


@pytest.fixture(scope="session")
def tiny_diffusers():
    """`tiny_diffusers("Flux")`: a small transformer, and inputs of an image of 4 x 3 tokens."""
    import diffusers

    def make(name: str, y: int = 4, x: int = 3) -> tuple[Any, dict[str, Any]]:
        kind, config, inputs = DIFFUSERS[name]
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.3)
        return model, inputs(y, x) | {"return_dict": False}

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "any_diffusers" in metafunc.fixturenames:
        metafunc.parametrize("any_diffusers", DIFFUSERS)


@pytest.fixture(scope="session")
def diffusers_rows() -> dict[str, tuple[str, ...]]:
    """Rows of the table of diffusers: class, layout, identity, exact angles."""
    return DIFFUSERS_ROWS


@pytest.fixture
def diffusers_page() -> tuple[list[list[str]], list[str]]:
    """The rows of the table of diffusers as docs/models.md has them, and the names that it should have."""
    return markdown.read_table(PAGE, "diffusers"), sorted(DIFFUSERS)


@pytest.fixture(scope="session")
def families() -> dict[str, tuple[float, float, float, str]]:
    """Rows of the table: identity, decoding, compiling, our op."""
    return ROWS


@pytest.fixture
def families_page() -> list[list[str]]:
    """The rows of the table as docs/models.md has them."""
    return markdown.read_table(PAGE, "families")


@pytest.fixture(scope="session")
def types_without_rotary() -> dict[str, tuple[float | None, str, str]]:
    """Rows of the second table: error with all tokens at one place, its bias, the reason of a refusal."""
    return PLAIN


@pytest.fixture
def types_without_rotary_page() -> list[list[str]]:
    """The rows of the second table as docs/models.md has them."""
    return markdown.read_table(PAGE, "types without rotary")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if ROWS and session.config.getoption("--write-families", default=False):
        titles = (
            "model type",
            "its own rope: logits",
            "three axes: generate less forward",
            "compiled",
            "our op",
        )
        rows = [(name, *map(markdown.round_up, errors), op) for name, (*errors, op) in sorted(ROWS.items())]
        markdown.write_table(PAGE, "families", markdown.table(titles, rows))
    if DIFFUSERS_ROWS and session.config.getoption("--write-families", default=False):
        titles = "model", "class", "layout", "its own rope: outputs", "exact angles"
        rows = [(name, *row) for name, row in sorted(DIFFUSERS_ROWS.items())]
        markdown.write_table(PAGE, "diffusers", markdown.table(titles, rows))
    if PLAIN and session.config.getoption("--write-families", default=False):
        titles = "model type", "served", "one place: error", "bias of relative positions"
        plain = [
            (name, reason or "yes", "" if error is None else markdown.round_up(error), bias)
            for name, (error, bias, reason) in sorted(PLAIN.items())
        ]
        markdown.write_table(PAGE, "types without rotary", markdown.table(titles, plain))
