"""Our rotation beside the Triton rotary of flash-attn, one file of its source archive."""

import importlib.util
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rope_mm.positions.packing import positions_of
from rope_mm.rotary.dispatch import make_angles, rotate

PEERS = Path(sys.prefix) / "peers"  # where `make` puts the file
FILE = "ops/triton/rotary.py"
ROUNDING = {"rtol": 0, "atol": 2e-6}  # of float32; q and k are below 5


def find_source() -> Path | None:
    """The file, beside the environment's packages or of an installed flash-attn."""
    spec = PathFinder.find_spec("flash_attn", [str(PEERS), *sys.path])
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return next((folder / FILE for folder in folders if (folder / FILE).exists()), None)


@pytest.fixture
def apply_rotary(monkeypatch):
    """flash-attn's function, its kernel interpreted on the CPU."""
    pytest.importorskip("triton", reason="wants the package triton, which is not installed")
    if (source := find_source()) is None:
        pytest.skip(f"wants flash_attn/{FILE} of flash-attn's source archive in {PEERS}: see the Makefile")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    spec = importlib.util.spec_from_file_location("flash_attn_rotary", source)
    assert spec and spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.apply_rotary


def tables(tokens, omega):
    """Cosine and sine (s, r) of whole positions from 0, as flash-attn takes them."""
    angles = make_angles(torch.arange(tokens)[:, None], omega)
    assert angles.cos is not None and angles.sin is not None
    return angles.cos[:, 0], angles.sin[:, 0]


def omega_of(pairs):
    return 1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)[None]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("d", "pairs"), [(16, 8), (40, 12), (256, 128)])
def test_heads_are_rotated_as_by_flash_attn(apply_rotary, pairing, d, pairs):
    x, omega = torch.randn(2, 11, 3, d), omega_of(pairs)
    expected = apply_rotary(x, *tables(11, omega), interleaved=pairing == "interleaved")
    ours, _ = rotate(x, None, torch.arange(11)[:, None], omega, pairing)
    torch.testing.assert_close(ours, expected, **ROUNDING)
    assert not torch.equal(expected[..., : 2 * pairs], x[..., : 2 * pairs])


def test_gradients_are_those_of_flash_attn(apply_rotary):
    x, grad, omega = torch.randn(1, 7, 2, 16, requires_grad=True), torch.randn(1, 7, 2, 16), omega_of(8)
    ours, _ = rotate(x, None, torch.arange(7)[:, None], omega)
    (found,) = torch.autograd.grad(ours, x, grad)
    # its backward is the rotation with the sine negated
    torch.testing.assert_close(found, apply_rotary(grad, *tables(7, omega), conjugate=True), **ROUNDING)


def test_rows_that_start_at_positions_of_their_own_are_rotated_as_by_flash_attn(apply_rotary):
    x, omega, starts = torch.randn(3, 4, 2, 16), omega_of(8), torch.tensor([0, 5, 19])
    expected = apply_rotary(x, *tables(32, omega), seqlen_offsets=starts)
    ours, _ = rotate(x, None, (starts[:, None] + torch.arange(4))[..., None], omega)
    torch.testing.assert_close(ours, expected, **ROUNDING)


def test_packed_sequences_are_rotated_as_by_flash_attn(apply_rotary):
    x, omega, ends = torch.randn(13, 2, 16), omega_of(8), torch.tensor([0, 3, 4, 13], dtype=torch.int32)
    expected = apply_rotary(x, *tables(9, omega), cu_seqlens=ends, max_seqlen=9)
    ours, _ = rotate(x[None], None, positions_of(ends)[:, None], omega)
    torch.testing.assert_close(ours[0], expected, **ROUNDING)


def test_bfloat16_is_rounded_once_as_by_flash_attn(apply_rotary):
    x, omega = torch.randn(1, 9, 2, 32).bfloat16(), omega_of(16)
    expected = apply_rotary(x, *tables(9, omega))
    ours, _ = rotate(x, None, torch.arange(9)[:, None], omega)
    # Triton's interpreter truncates to bfloat16 where hardware rounds: one step at most
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)
