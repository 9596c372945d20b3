"""Rotation on a CPU beside transformers' and beside a copy, in one process.

    python kernels/bench/cpu.py             all sizes, float32 and bfloat16, forward and backward
    python kernels/bench/cpu.py --quick     1, 16, 64 and 1024 tokens, few rounds
    python kernels/bench/cpu.py --json F    writes what it found to F as well
    python kernels/bench/cpu.py --threads 2 with two threads, by wall clock: measure on a quiet machine

Contenders alternate, and each begins its round with a call that is not counted, so that the allocator's
state is its own. On one thread a time is the thread's own, which neighbours on the machine hardly touch. A
ratio is the median over the rounds of (median of one contender's calls) / (median of the other's); the spread
is its quartiles. "parts alone" is the same ratio of what a rotation is made of: its functions of torch on
numbers that stay in the cache, and copies of q and k in memory. Heads are (1, s, 32, 128) and (1, s, 8, 128)
unless a shape is named. Tables are made before the clock starts, but for a learned Omega, whose angles are
made anew at every call; results are new tensors.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import report
import torch
from torch import Tensor

from rope_mm.analysis import markdown
from rope_mm.rotary import cpu as parts
from rope_mm.rotary.dispatch import make_angles, rotate

CALLS = 4  # counted calls of one round
FEW_CALLS = 64  # of few tokens, which take microseconds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
# (contender, what it is measured by, at most)
GOALS = {
    "rope_mm": ("transformers", 0.5, DTYPES, PASSES),
    "rope_mm compiled": ("copy", 1.2, ("float32",), ("forward",)),
    "rope_mm, learned Omega": ("transformers", 1.2, DTYPES, PASSES[1:]),
    "rope_mm, learned Omega per head": ("transformers", 1.2, DTYPES, PASSES[1:]),
}
# contender -> rows of a learned Omega, none for ready tables; those of which `parts_alone` is measured
ROWS = {"rope_mm": 0, "rope_mm, learned Omega": 1, "rope_mm, learned Omega per head": 8}
# of few tokens, forward alone: what a call costs
FEW_GOALS = {1: 1.2, 16: 1.2, 64: 1.0}


class Row(NamedTuple):
    """A contender's time over another's: median and quartiles of the rounds, and the bound it should keep.

    `least` is the ratio of `parts_alone`, None where it was not measured.
    """

    tokens: str
    dtype: str
    way: str
    contender: str
    other: str
    ms: float
    other_ms: float
    ratio: float
    low: float
    high: float
    goal: float
    least: float | None = None


def contenders(tokens: int, dtype: torch.dtype, d: int = 128) -> dict[str, Callable[[Tensor, Tensor], tuple]]:
    """Functions of q and k (b, s, heads, d), tables made but of a learned Omega."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions, omega = torch.arange(tokens)[:, None], 1e4 ** -torch.linspace(0, 1, d // 2 + 1)[None, :-1]
    angles = make_angles(positions, omega, dtype=dtype)
    assert angles.cos is not None and angles.sin is not None
    cos, sin = (torch.cat((x, x), -1).squeeze(-2)[None].to(dtype) for x in (angles.cos, angles.sin))

    def theirs(q, k):
        return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    learned = omega.clone().requires_grad_(), omega.expand(8, 1, -1).clone().requires_grad_()

    return {
        "copy": lambda q, k: (q.clone(), k.clone()),
        "transformers": theirs,
        "rope_mm": angles.rotate,
        # a graph of one size: compiled for any heads and channels it is no vector code
        "rope_mm compiled": torch.compile(lambda q, k: angles.rotate(q, k), dynamic=False),
        "rope_mm, learned Omega": lambda q, k: rotate(q, k, positions, learned[0]),
        "rope_mm, learned Omega per head": lambda q, k: rotate(q, k, positions, learned[1]),
    }


def parts_alone(q: Tensor, k: Tensor, back: bool, rows: int) -> Callable[[], None]:
    """What rotating q and k, and back, is made of: functions of torch on one part, so often, and copies.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        back: whether backward is counted, too.
        rows: of an Omega whose angles and gradients are made, too; 0 where there is none.
    """
    slot, wide = parts.Slot("half"), torch.promote_types(q.dtype, torch.float32)
    part = q[:, : parts.part_length(q)].contiguous()
    out, (cos, sin) = torch.empty_like(part), torch.rand(2, part.shape[1], 1, q.shape[3], dtype=wide)
    source, goal = torch.empty(2, *part.shape, dtype=wide)
    product, summed = torch.empty(2, *part.shape[:3], part.shape[3] // 2, dtype=wide)
    views = [parts.pair_views(x, slot) for x in (goal, source, sin)]
    angle = torch.rand(q.shape[1], max(rows, 1), q.shape[3] // 2, dtype=torch.float64) * q.shape[1]
    count, converted = round((q.numel() + k.numel()) / part.numel()), q.dtype != wide

    def rotate_part() -> None:
        torch.mul(source.copy_(part) if converted else source, cos, out=goal)
        parts.add_swapped(views, 1.0)
        if converted:
            out.copy_(goal)

    def sum_part() -> None:
        if converted:
            goal.copy_(part)
        (y1, y2), (g1, g2) = views[0][0], views[1][0]
        torch.mul(y1, g2, out=product).addcmul_(y2, g1, value=-1)
        torch.sum(product, 2, out=summed[:, :, 0])

    def once() -> None:
        for _ in range(1 + back):
            kept = q.clone(), k.clone()  # each number is read from memory, and written into new memory
            for _ in range(count):
                rotate_part()
        del kept
        if rows:
            parts.widen(angle.cos().to(wide), angle.sin().to(wide), slot)
            for _ in range(count):
                sum_part()

    return once


def there_and_back(call: Callable, q: Tensor, k: Tensor) -> Callable[[], tuple]:
    """Forward and backward with gradients of its results' strides."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    grads = [torch.randn_like(x) for x in call(q, k)]

    def once():
        rotated = call(q, k)
        torch.autograd.backward(rotated, grads)  # to a learned Omega, too
        q.grad = k.grad = None
        return rotated

    return once


def alternate(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float], count: int = CALLS
) -> dict[str, list]:
    """Seconds of a call of every contender, the median of `count` in each round."""
    times: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            seconds = []
            for _ in range(count):
                start = clock()
                kept = call()
                seconds.append(clock() - start)
                del kept  # before the next call, whose results take its place
            times[name].append(statistics.median(seconds))
    return times


def goals_of(tokens: int, name: str, way: str) -> dict[str, tuple[str, float]]:
    """By contender, what it is measured by and the bound."""
    if tokens in FEW_GOALS:
        return {"rope_mm": ("transformers", FEW_GOALS[tokens])} if way == "forward" else {}
    return {who: goal[:2] for who, goal in GOALS.items() if name in goal[2] and way in goal[3]}


def compare(
    tokens: int,
    name: str,
    way: str,
    rounds: int,
    clock: Callable[[], float],
    shape: tuple[int, int, int, int] = (1, 32, 8, 128),
) -> list[Row]:
    """The rows of this size, dtype and way for which there is a goal; shape is b, h, g, d."""
    dtype, (b, h, g, d) = DTYPES[name], shape
    q, k = (torch.randn(b, tokens, heads, d, dtype=dtype) for heads in (h, g))
    goals = goals_of(tokens, name, way)
    wanted = {*goals, *(other for other, _ in goals.values())}
    calls = {who: call for who, call in contenders(tokens, dtype, d).items() if who in wanted}
    ready = {
        who: (lambda call=call: call(q, k)) if way == "forward" else there_and_back(call, q, k)
        for who, call in calls.items()
    }
    if tokens not in FEW_GOALS:
        for who in set(goals) & set(ROWS):
            ready[f"parts of {who}"] = parts_alone(q, k, way != "forward", ROWS[who])
    times = alternate(ready, rounds, clock, FEW_CALLS if tokens in FEW_GOALS else CALLS)
    size = str(tokens) if shape == (1, 32, 8, 128) else f"{b} x {tokens}, heads {h}, {g}, {d}"
    rows = []
    for who, (other, bound) in goals.items():
        low, ratio, high = over(times[who], times[other])
        alone = times.get(f"parts of {who}")
        least = None if alone is None else over(alone, times[other])[1]
        ms = (1e3 * statistics.median(times[x]) for x in (who, other))
        rows.append(Row(size, name, way, who, other, *ms, ratio, low, high, bound, least))
    return rows


def over(ours: list[float], theirs: list[float]) -> list[float]:
    """Quartiles of the ratios of the rounds."""
    return statistics.quantiles([x / y for x, y in zip(ours, theirs, strict=True)], n=4)


def show(rows: list[Row]) -> str:
    """The table, with the goals that are missed."""
    titles = "tokens", "dtype", "pass", "contender", "ms", "beside", "ms"
    titles += "ratio today (quartiles)", "parts alone", "goal"
    return markdown.table(
        titles,
        (
            (
                *row[:4],
                f"{row.ms:.3g}",
                row.other,
                f"{row.other_ms:.3g}",
                f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
                "" if row.least is None else f"{row.least:.2f}",
                f"<= {row.goal}" + ", missed" * (row.ratio > row.goal),
            )
            for row in rows
        ),
    )


def main() -> None:
    """Read the flags, measure, print the table."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--quick", action="store_true", help="the small size and few rounds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 1024, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    clock = time.thread_time if flags.threads == 1 else time.perf_counter
    sizes, rounds = (flags.tokens[:4], 4) if flags.quick else (flags.tokens, flags.rounds)
    cases = [(tokens, (1, 32, 8, 128), PASSES) for tokens in sizes]
    if flags.threads > 1:
        cases = [(4096, (1, 16, 4, 128), PASSES[:1]), (256, (8, 8, 8, 64), PASSES[:1])]
    found = report.provenance(("torch", "transformers"))
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    rows = [
        row
        for tokens, shape, ways in cases
        for name in DTYPES
        for way in ways
        for row in compare(tokens, name, way, rounds, clock, shape)
    ]
    print(show(rows))
    if flags.json:
        report.write_json(flags.json, {**found, "rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
