"""What people wait for beside rotation itself: generating, placing, streaming and metrics, on one thread.

    python kernels/bench/library.py             all rows
    python kernels/bench/library.py --quick     smaller sizes and few rounds

Ours and the other alternate in one process; a time is the process's own, which neighbours on the machine
hardly touch. A ratio is the median over the rounds of ours / theirs; the spread is its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import cpu
import report
import torch

from rope_mm import Cursor, Image, MoreFrames, Text, Video, place
from rope_mm.analysis import markdown
from rope_mm.evaluation.metrics import kid, prdc

IMAGES, SIDE = 256, 16  # of `place`; rows and columns of an image
FRAMES = 2_000  # one by one
SAMPLES = 10_000  # of the metrics
NEW_TOKENS = 96


class Case(NamedTuple):
    """Two calls that do the same.

    Attributes:
        what: the row's name.
        ours: a call of this library.
        other: the name of the other one.
        theirs: the other one.
        goal: ours over theirs, at most.
        seconds: ours, at most; None where the machine decides.
        rounds: of the two, at most.
    """

    what: str
    ours: Callable[[], object]
    other: str
    theirs: Callable[[], object]
    goal: float
    seconds: float | None = None
    rounds: int = 99


def generation(new_tokens: int = NEW_TOKENS, layers: int = 8) -> Iterator[Case]:
    """`generate` of a small Llama as it is, with a scheme of ours, and with our op."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rope_mm.hf import rope_of, set_rope, use_kernels

    def make() -> Any:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=1000, eos_token_id=None, **sizes, **heads)).eval()

    prompt = torch.arange(32)[None]
    own, scheme, op, plain = make(), make(), make(), make()
    set_rope(own, rope_of(own))
    set_rope(scheme, "rope-tv")
    use_kernels(op)
    run = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    theirs = partial(plain.generate, prompt, **run)
    yield Case(
        "generate, set_rope of its own", partial(own.generate, prompt, **run), "unpatched", theirs, 1.02
    )
    yield Case("generate, rope-tv", partial(scheme.generate, prompt, **run), "unpatched", theirs, 1.02)
    yield Case("generate, use_kernels", partial(op.generate, prompt, **run), "unpatched", theirs, 1.0)


def placing(images: int = IMAGES) -> Iterator[Case]:
    """Positions of a text with images, by Qwen2-VL's rule."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    segments = [Text(20), Image(SIDE, SIDE)] * images
    with torch.device("meta"):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {**sizes, "num_key_value_heads": 1, "vocab_size": 9}
        vision = {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 8, "spatial_merge_size": 2}
        model = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))
    kinds = torch.cat([torch.zeros(20), torch.ones(SIDE * SIDE)]).repeat(images).int()[None]
    grids = torch.tensor([[1, 2 * SIDE, 2 * SIDE]]).repeat(images, 1)
    theirs = partial(model.get_rope_index, torch.zeros_like(kinds).long(), kinds, grids)
    yield Case(f"place, {images} images", lambda: place(segments, "m-rope-hf"), "get_rope_index", theirs, 1.0)


def stream(frames: int) -> Cursor:
    """Place a video frame by frame, and return where it stops."""
    _, cursor = place([Video(1, 4, 4)], "rope-tv-causal")
    for _ in range(frames - 1):
        _, cursor = place([MoreFrames(1, 4, 4)], "rope-tv-causal", cursor)
    return cursor


def streaming(frames: int = FRAMES) -> Iterator[Case]:
    """Frames one by one: linear in their number."""
    few = frames // 4
    four_times = f"4 times {few}"
    yield Case(
        f"{frames} MoreFrames",
        lambda: stream(frames),
        four_times,
        lambda: [stream(few) for _ in range(4)],
        1.2,
        seconds=1.0,
    )


def metrics(samples: int = SAMPLES) -> Iterator[Case]:
    """Neighbourhoods and the kernel distance of features (n, 64)."""
    real, fake = (torch.randn(samples, 64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    size = f"{samples} x {samples} x 64"
    if find_spec("prdc"):
        from prdc import compute_prdc

        theirs = partial(compute_prdc, real.double().numpy(), fake.double().numpy(), nearest_k=5)
        yield Case(f"prdc, {size}", lambda: prdc(real, fake), "prdc", theirs, 0.5, 4.0, 3)
    if find_spec("torchmetrics"):
        from torchmetrics.image.kid import poly_mmd

        def whole() -> float:
            return float(poly_mmd(real.double(), fake.double(), 3, None, 1.0))

        yield Case(f"kid, {size}", lambda: kid(real, fake), "torchmetrics", whole, 1.0, 4.0, 3)


def measure(case: Case, rounds: int, clock: Callable[[], float] = time.process_time) -> list[str]:
    """The row of a case."""
    rounds = min(rounds, case.rounds)
    times = cpu.alternate({"ours": case.ours, "theirs": case.theirs}, rounds, clock, 1)
    ratios = [x / y for x, y in zip(times["ours"], times["theirs"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (statistics.median(times[who]) for who in ("ours", "theirs"))
    missed = ratio > case.goal or (case.seconds is not None and ours > case.seconds)
    goal = f"<= {case.goal}" + (f", <= {case.seconds:g} s" if case.seconds else "") + ", missed" * missed
    ms = (f"{1e3 * ours:.4g}", case.other, f"{1e3 * theirs:.4g}")
    return [case.what, *ms, f"{ratio:.2f} ({low:.2f} to {high:.2f})", goal]


def main() -> None:
    """Read the flags, measure, print the table."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and few rounds")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    samples, rounds = (2_000, 4) if flags.quick else (SAMPLES, 8)
    found = report.provenance(("torch", "transformers", "prdc", "torchmetrics"))
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    cases = (*generation(), *placing(), *streaming(), *metrics(samples))
    rows = [measure(case, rounds) for case in cases]
    print(markdown.table(("what", "ms", "beside", "ms", "ratio today (quartiles)", "goal"), rows))


if __name__ == "__main__":
    main()
