import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_mm.hf.cos_sin_tables import TABLE_FORMATS, fill_tables, find_pairing, read_tables, split_tables
from rope_mm.rotary.definition import PAIRINGS, apply_rotary


def angles(p, omega):
    return sum(p[:, axis, None] * row for axis, row in enumerate(omega))


@pytest.mark.parametrize("table_format", TABLE_FORMATS)
@given(
    a=st.integers(1, 3),
    rounds=st.integers(1, 3),
    factor=st.floats(0.5, 2),
    step=st.floats(0.1, 3),
    seed=st.integers(0, 99),
)
def test_what_was_read_from_tables_fills_them_again_bit_for_bit(table_format, a, rounds, factor, step, seed):
    torch.manual_seed(seed)
    omega = torch.rand(a, 2 * a * rounds)
    p = torch.cat((torch.zeros(1, a), step * torch.eye(a), torch.randint(3, 999, (5, a))))
    p = p[torch.randperm(len(p))]
    tables = fill_tables(angles(p, omega), table_format, factor, a)
    name, found, times = read_tables(tables, p, omega.flatten())
    assert torch.equal(found, omega) and times == pytest.approx(factor)
    again = fill_tables(angles(p, found), name, factor, a)
    assert all(torch.equal(x, y) for x, y in zip(split_tables(again), split_tables(tables), strict=True))


def test_unknown_frequencies_are_read_to_the_accuracy_of_an_arc_tangent():
    omega, p = torch.tensor([[0.5, 0.01]]), torch.tensor([[0.0], [1.0]])
    _, found, _ = read_tables(fill_tables(angles(p, omega), "half"), p, torch.tensor([3.0]))
    assert torch.allclose(found, omega, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_the_pairing_of_a_function_is_found_also_where_it_moves_channels(pairing):
    unit, angle = torch.eye(12)[None, :, None], torch.linspace(0.5, 1, 6).expand(12, 1, 6)
    moved = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    q, k = (apply_rotary(unit, x.cos(), x.sin(), pairing)[0, :, 0] for x in (angle, 0 * angle))
    assert find_pairing(q, k) == find_pairing(q[:, moved], k[:, moved]) == pairing


def test_find_pairing_returns_none_for_another_pairing():
    unit, angle = torch.eye(12)[None, :, None], torch.linspace(0.5, 1, 6).expand(12, 1, 6)
    assert "block" in PAIRINGS
    q, k = (apply_rotary(unit, x.cos(), x.sin(), "block", (3, 3))[0, :, 0] for x in (angle, 0 * angle))
    assert find_pairing(q, k) is None
