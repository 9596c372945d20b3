"""The examples in docstrings of the names that people use most run as written."""

import doctest
import sys
from inspect import getmodule

import pytest

from rope_mm import (
    PoPE,
    Rotary,
    Scheme,
    check_rotary,
    convert_pairing,
    measure_properties,
    parse_segments,
    place,
    positions_of,
    rotate,
    rotate_by_angles,
)
from rope_mm.hf import set_rope
from rope_mm.losses import gamma

MOST_USED = [
    PoPE,
    Rotary,
    Scheme,
    check_rotary,
    convert_pairing,
    gamma,
    measure_properties,
    parse_segments,
    place,
    positions_of,
    rotate,
    rotate_by_angles,
    set_rope,
]


@pytest.mark.parametrize("public", MOST_USED, ids=lambda public: public.__name__)
def test_the_example_in_a_docstring_gives_what_it_says(public):
    module = getmodule(public)
    assert module
    names = vars(sys.modules[module.__name__])
    (test,) = doctest.DocTestFinder(recurse=False).find(public, public.__name__, globs=dict(names))
    found = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=found.append)
    assert result.attempted
    assert not result.failed, "".join(found)
