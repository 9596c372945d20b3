from dataclasses import dataclass

import pytest

from rope_mm.training.config import load, option
from rope_mm.training.unread_keys import refuse_unread, reset_unread


@dataclass(frozen=True, kw_only=True)
class Oven:
    """An oven."""

    heat: float = option(1.0, "of the oven")
    trays: list[str] = option(["low"], "in the oven")


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    """A kitchen."""

    cold: bool = option(False, "no oven")
    note: str | None = option(None, "a note")
    oven: Oven = option(Oven(), "the oven")


UNREAD = {"oven": "cold is true", "note": "nobody reads notes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--oven.heat", "2"], "oven.heat 2.0 would change nothing: cold is true; .* --oven.heat 1.0, its"),
        (["--oven.trays", "[a, b]"], r"oven.trays '\[a, b\]' would change .* --oven.trays '\[low\]', its"),
        (["--note", "hm"], "note hm would change nothing: nobody reads notes; .* give --note null, its"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_the_flag_that_takes_it_back(flags, message):
    config = load(Kitchen, flags)
    with pytest.raises(ValueError, match=message) as refusal:
        refuse_unread(config, UNREAD)
    undo = str(refusal.value).partition("or give ")[2].partition(", its")[0].replace("'", "").split(" ", 1)
    mended = dict(zip(flags[::2], flags[1::2], strict=True)) | dict([undo])
    refuse_unread(load(Kitchen, [word for pair in mended.items() for word in pair]), UNREAD)
    refuse_unread(config, {})


def test_keys_that_nothing_reads_get_their_defaults_and_others_stay():
    config = load(Kitchen, ["--cold", "true", "--oven.heat", "2", "--note", "hm"])
    assert reset_unread(config, {"oven.heat": "cold"}) == load(Kitchen, ["--cold", "true", "--note", "hm"])
    assert reset_unread(config, UNREAD) == load(Kitchen, ["--cold", "true"])
