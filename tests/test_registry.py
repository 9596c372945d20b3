"""What is said where a name is unknown: the nearest names, and where all are listed if they are many."""

import pytest

from rope_mm import LAYOUTS, SCHEMES
from rope_mm.hf.rope_parameters import FAMILIES
from rope_mm.losses import GAN_LOSSES
from rope_mm.registry import MOST_LISTED, Registry

LARGE = {"scheme": SCHEMES, "layout": LAYOUTS, "GAN loss": GAN_LOSSES, "model_type": FAMILIES}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("unknown", ["zzz", "mrope", "rope-vt", "an-image", ""])
def test_many_names_are_not_listed_but_the_nearest_and_the_place_of_all(kind, unknown):
    registry = LARGE[kind]
    assert len(registry) > MOST_LISTED
    with pytest.raises(
        ValueError, match=f"{kind} {unknown!r} is unknown; .*`.*` lists all {len(registry)}$"
    ) as e:
        registry[unknown]
    named = [
        name for name in (*registry, *registry.aliases) if repr(name) in str(e.value) and name != unknown
    ]
    assert len(named) <= 3 and len(str(e.value)) < 200


def test_few_names_are_listed():
    with pytest.raises(
        ValueError, match=r"colour 'rde' is unknown; did you mean 'red'\? there are: blue, red"
    ):
        Registry("colour", {"red": 1, "blue": 2})["rde"]


@pytest.mark.parametrize("key", [["red"], {"red": 1}, None, 3])
def test_what_is_no_name_is_refused_like_an_unknown_name(key):
    with pytest.raises(ValueError, match=r"colour .* is unknown"):
        Registry("colour", {"red": 1, "blue": 2})[key]
