"""Rotation on a CPU beside transformers' and beside a copy, in one process and one thread.

    python kernels/bench/cpu.py            both sizes, float32 and bfloat16, forward and backward
    python kernels/bench/cpu.py --quick    the small size, few rounds
    python kernels/bench/cpu.py --json F   writes what it found to F as well

Contenders take turns, and each begins its turn with a call that is not counted, so that the allocator's
state is its own. A time is the thread's own, which neighbours on the machine hardly touch. A ratio is the
median over the rounds of (median of one contender's turn) / (median of the other's); the spread is its
quartiles. Heads are (1, s, 32, 128) and (1, s, 8, 128); tables are made before the clock starts; results are
new tensors.
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
from rope_mm.rotary.dispatch import make_angles

TURN = 4  # counted calls of one turn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
# (contender, what it is measured by, at most)
GOALS = {
    "rope_mm": ("transformers", 0.5, DTYPES, PASSES),
    "rope_mm compiled": ("copy", 1.2, ("float32",), ("forward",)),
}


class Row(NamedTuple):
    """A contender's time over another's: median and quartiles of the rounds, and the bound it should keep."""

    tokens: int
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


def contenders(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], tuple]]:
    """Functions of q and k (1, s, heads, 128), tables made."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions, omega = torch.arange(tokens)[:, None], 1e4 ** -torch.linspace(0, 1, 65)[None, :-1]
    angles = make_angles(positions, omega, dtype=dtype)
    assert angles.cos is not None and angles.sin is not None
    cos, sin = (torch.cat((x, x), -1).squeeze(-2)[None].to(dtype) for x in (angles.cos, angles.sin))

    def theirs(q, k):
        return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return {
        "copy": lambda q, k: (q.clone(), k.clone()),
        "transformers": theirs,
        "rope_mm": angles.rotate,
        "rope_mm compiled": torch.compile(lambda q, k: angles.rotate(q, k)),
    }


def there_and_back(call: Callable, q: Tensor, k: Tensor) -> Callable[[], tuple]:
    """Forward and backward with gradients of its results' strides."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    grads = [torch.randn_like(x) for x in call(q, k)]
    return lambda: torch.autograd.grad(call(q, k), (q, k), grads)


def play(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list]:
    """Seconds of every contender's turns, by round."""
    times: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            turn = []
            for _ in range(TURN):
                start = clock()
                kept = call()
                turn.append(clock() - start)
                del kept  # before the next call, whose results take its place
            times[name].append(statistics.median(turn))
    return times


def compare(tokens: int, name: str, way: str, rounds: int, clock: Callable[[], float]) -> list[Row]:
    """The rows of this size, dtype and way for which there is a goal."""
    dtype = DTYPES[name]
    q, k = (torch.randn(1, tokens, heads, 128, dtype=dtype) for heads in (32, 8))
    goals = {who: goal[:2] for who, goal in GOALS.items() if name in goal[2] and way in goal[3]}
    wanted = {*goals, *(other for other, _ in goals.values())}
    calls = {who: call for who, call in contenders(tokens, dtype).items() if who in wanted}
    ready = {
        who: (lambda call=call: call(q, k)) if way == "forward" else there_and_back(call, q, k)
        for who, call in calls.items()
    }
    times = play(ready, rounds, clock)
    rows = []
    for who, (other, bound) in goals.items():
        ratios = [x / y for x, y in zip(times[who], times[other], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        ms = (1e3 * statistics.median(times[x]) for x in (who, other))
        rows.append(Row(tokens, name, way, who, other, *ms, ratio, low, high, bound))
    return rows


def show(rows: list[Row]) -> str:
    """The table, with the goals that are missed."""
    titles = "tokens", "dtype", "pass", "contender", "ms", "beside", "ms", "ratio (quartiles)", "goal"
    return markdown.table(
        titles,
        (
            (
                *row[:4],
                f"{row.ms:.1f}",
                row.other,
                f"{row.other_ms:.1f}",
                f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--json", type=Path, help="a file for the rows")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    sizes, rounds = (flags.tokens[:1], 4) if flags.quick else (flags.tokens, flags.rounds)
    found = report.provenance(("torch", "transformers"))
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    rows = [
        row
        for tokens in sizes
        for name in DTYPES
        for way in PASSES
        for row in compare(tokens, name, way, rounds, time.thread_time)
    ]
    print(show(rows))
    if flags.json:
        report.write_json(flags.json, {**found, "rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
