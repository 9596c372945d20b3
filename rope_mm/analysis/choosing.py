"""Which scheme for which task: what docs/choosing.md says, as data, and what `rope-mm choose` prints."""

import re
from dataclasses import dataclass

from rope_mm.analysis import markdown
from rope_mm.analysis.properties import HEAD_DIM, properties_table
from rope_mm.registry import Registry
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.frequencies import ownership_map
from rope_mm.schemes.zoo import SCHEMES


@dataclass(frozen=True)
class Choice:
    """A scheme for a task.

    Attributes:
        task: what the user has, in words.
        scheme: a key of SCHEMES; "" for the model's own.
        because: the reason, with its number from docs/results.md or the table of properties.
        code: lines of Python that use it.
        others: schemes that are as good, or come next.
        theta: the scheme's own if None.
    """

    task: str
    scheme: str
    because: str
    code: str
    others: tuple[str, ...] = ()
    theta: float | None = None

    @property
    def name(self) -> str:
        """What to take, as a cell of a table."""
        names = [f"`{name}`" for name in (self.scheme, *self.others)]
        return " or ".join(names) if self.scheme else "its own scheme"


CHOICES: Registry[Choice] = Registry(
    "task",
    {
        "text": Choice(
            "text only",
            "flat",
            "it is plain RoPE; at your checkpoint's theta the frequencies stay as they are ([how](#theta))",
            'rope = Rotary(head_dim=64, scheme="flat")',
        ),
        "vit": Choice(
            "a ViT",
            "rope-2d",
            "cells of a grid at untrained sizes: 98.4 % right under axial positions, 14.1 % under `flat`",
            'handle = set_rope(vit, "rope-2d", theta=100.0)',
            theta=100.0,
        ),
        "qwen-vl": Choice(
            "a pretrained Qwen-VL",
            "",
            "`set_rope(model, rope_of(model))` changes the logits by 0.0",
            "handle = set_rope(model, rope_of(model))",
        ),
        "text-image": Choice(
            "a new model for text and images",
            "videorope",
            "among the best within noise at untrained sizes: cells 93.2 %, order of images 66.3 %",
            'rope = Rotary(head_dim=64, scheme="videorope")',
        ),
        "video": Choice(
            "videos of unknown length",
            "rope-tv-causal",
            "on the axes t, y and x it alone has [all four properties](schemes.md#what-each-scheme-promises)",
            'rope = Rotary(head_dim=64, scheme="rope-tv-causal")',
        ),
        "long-video": Choice(
            "videos much longer than trained",
            "grid",
            "motions at untrained lengths: 52.4 % right, the next scheme 26.1 %",
            'rope = Rotary(head_dim=64, scheme="grid", theta=100.0)',
            theta=100.0,
        ),
        "images": Choice(
            "a folder of captioned images",
            "rope-tv",
            "the settings of `digits.yaml` were tuned with it: 99.9 % of digits recognised",
            'rope = Rotary(head_dim=64, scheme="rope-tv", theta=100.0)',
            theta=100.0,
        ),
        "diffusion": Choice(
            "a diffusion transformer",
            "",
            "the scheme of the model you start from: queries and keys equal the original's to 7e-6",
            'rope = Rotary(head_dim=128, scheme="flux")  # or flux2, wan, qwen-image, ltx ...',
        ),
    },
)


def choices_table() -> str:
    """The tasks, what to take for each and why, as a Markdown table."""
    rows = ((choice.task, choice.name, choice.because) for choice in CHOICES.values())
    return markdown.table(("you have", "take", "because"), rows)


def list_tasks() -> str:
    """The tasks, a line each."""
    width = max(map(len, CHOICES))
    return "\n".join(f"{name:{width}}  {choice.task}" for name, choice in CHOICES.items())


def explain_choice(task: str, head_dim: int = HEAD_DIM) -> str:
    """What to take for a task: the scheme, why, the lines of Python, its Omega and its properties.

    Args:
        task: a key of CHOICES.
        head_dim: channels of a head, for the map of Omega.

    Raises:
        ValueError: an unknown task, with the nearest one.
    """
    choice = CHOICES[task]
    because = re.sub(r" \(\[.*?\]\(.*?\)\)", "", choice.because)  # a link in brackets
    because = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", because).replace("`", "")
    lines = [f"{choice.task}: {choice.name.replace('`', '')}", f"because: {because}", "", choice.code]
    if choice.scheme:
        scheme = SCHEMES[choice.scheme]
        rope = Rotary(head_dim, scheme if choice.theta is None else scheme.replace(theta=choice.theta))
        lines += [
            "",
            f"axis of each pair, at head_dim {head_dim}",
            ownership_map(rope.omega, rope.scheme.axes),
        ]
        lines += ["", properties_table([choice.scheme, *choice.others])]
    return "\n".join([*lines, "", "where the numbers come from: docs/choosing.md"])
