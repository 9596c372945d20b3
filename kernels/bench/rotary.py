"""The kernels' speed as a share of a copy of as many bytes, beside their peers'; needs a GPU.

    python kernels/bench/rotary.py               all shapes, strides, passes and contenders
    python kernels/bench/rotary.py --dry-run     the rows with their bytes, on any machine
    python kernels/bench/rotary.py --no-tests    times only: nothing is compared that was not tested

PYTHONPATH must hold the root and kernels/. The tests of the kernels run first; where they fail, times are
printed without ratios, and the exit code is 1 (2 without a GPU). A time is the median of Triton's do_bench,
which empties the cache between calls; what a contender returns is compared with float32 first, in small.
Peers take part if they can be imported; the folder --out gets rotary.json and rotary.png.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
import torch._functorch.config
from cases import DECODE, DECODES, LAYOUTS, PASSES, SHAPES, Shape, expected, floor, make
from contenders import CONTENDERS, OURS
from torch import Tensor

from rope_mm.analysis import markdown

NO_GPU = (
    "There is no GPU here, so nothing is timed; run this where torch.cuda is available, "
    "or list the rows by --dry-run."
)
# shares of a copy on an H200, and times of peers over ours: of the fastest and of their median
GOALS = {"forward": 0.93, "backward": 0.90, "backward with dOmega": 0.85, "norm forward": 0.90}
FASTEST, MEDIAN = 1.0, 1.3
# rounding of tables and of results to 16 bits, at heads of six standard deviations
CLOSE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn", "fla-core", "torchembed")
WAYS = {**PASSES, **DECODES}


class Plan(NamedTuple):
    """A row to be measured, and the bytes it must move."""

    shape: Shape
    layout: str
    way: str
    contender: str
    bytes: int


class Row(NamedTuple):
    """What was measured: milliseconds, and those of a copy of as many bytes; or why there is none."""

    plan: Plan
    ms: float = math.nan
    copy_ms: float = math.nan
    problem: str = ""

    @property
    def share(self) -> float:
        """Bytes per second over the copy's; NaN for wrong results."""
        return math.nan if self.problem else self.copy_ms / self.ms


class Clock:
    """Milliseconds of a call on this GPU."""

    def kernel(self, call: Callable[[], Any]) -> float:
        """Of its kernels, one after another, with an empty cache."""
        from triton.testing import do_bench

        return float(do_bench(call, return_mode="median"))  # pyright: ignore

    def graph(self, call: Callable[[], Any]) -> float:
        """As a CUDA graph."""
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(call, return_mode="median"))  # pyright: ignore

    def wall(self, call: Callable[[], Any], calls: int = 100, rounds: int = 20) -> float:
        """By the clock on the wall, calls following each other as in a decoding loop."""
        times = []
        for _ in range(rounds + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / calls)
        return statistics.median(times[2:])


def plans() -> Iterator[Plan]:
    """Every row, whether its contender is here or not."""
    cases = [(shape, layout, way) for shape in SHAPES for layout in LAYOUTS for way in PASSES]
    cases += [(shape, "BSHD", way) for shape in DECODE for way in DECODES]
    for shape, layout, way in cases:
        for name, contender in CONTENDERS.items():
            asked = "forward" if way in DECODES else way
            if asked in contender.passes and shape.a in (contender.axes or (shape.a,)):
                yield Plan(shape, layout, way, name, floor(shape, WAYS[way]))


def disagreement(plan: Plan, device: str, dtype: torch.dtype) -> str:
    """How far a contender's results are from the truth in a small case of this shape, if too far."""
    shape = plan.shape._replace(b=min(plan.shape.b, 2), s=min(plan.shape.s, 100))
    case = make(shape, plan.layout, device, dtype)
    right = expected(case, plan.way)
    found = CONTENDERS[plan.contender].passes[plan.way](case)() if right else ()
    errors = [float((x - y).abs().max()) for x, y in zip(found, right, strict=False)]
    return "" if all(error <= CLOSE[dtype] for error in errors) else f"wrong by {max(errors):.2g}"


def copy(size: int, device: str) -> Callable[[], Tensor]:
    """Read half of these bytes and write as many."""
    source, goal = torch.zeros(2, max(1, size // 2), dtype=torch.uint8, device=device)
    return lambda: goal.copy_(source)


def timed(plan: Plan, tick: Callable, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """Milliseconds of a row, and what is wrong with it."""
    asked = plan._replace(way="forward") if plan.way in DECODES else plan
    try:
        problem = disagreement(asked, device, dtype)
        call = CONTENDERS[plan.contender].passes[asked.way](make(plan.shape, plan.layout, device, dtype))
        return tick(call), problem
    except Exception as error:  # someone else's code: its row says what happened
        if plan.contender == OURS:
            raise
        return math.nan, f"{type(error).__name__}: {error}".splitlines()[0]


def measure(rows: list[Plan], clock: Any, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Time the rows of contenders that are here."""
    copies: dict[tuple[int, str], float] = {}
    found = []
    # gradients are asked for again and again of one graph
    with torch._functorch.config.patch(donated_buffer=False):
        for plan in rows:
            if not CONTENDERS[plan.contender].here:
                continue
            key = plan.bytes, WAYS[plan.way].clock
            tick = getattr(clock, key[1])
            if plan.bytes and key not in copies:
                copies[key] = tick(copy(plan.bytes, device))
            ms, problem = timed(plan, tick, device, dtype)
            found.append(Row(plan, ms, copies.get(key, math.nan), problem))
            torch.compiler.reset()
    return found


def beside(row: Row, rows: list[Row]) -> float:
    """The time of a row over that of ours in the same pass; NaN where ours has none or the row is wrong."""
    ours = (x for x in rows if x.plan[:3] == row.plan[:3] and x.plan.contender == OURS)
    return row.ms / next((x.ms for x in ours), math.nan) if not row.problem else math.nan


def show(rows: list[Row], compared: bool) -> str:
    """The table, in Markdown; without ratios unless `compared`."""

    def number(x: float, form: str) -> str:
        return "-" if math.isnan(x) else format(x, form)

    def ratio(x: float, form: str) -> str:
        return number(x if compared else math.nan, form)

    titles = "b s h g d a", "layout", "pass", "contender", "MB", "ms", "GB/s", "of copy", "time / ours", ""
    lines = (
        (
            *row.plan[:4],
            f"{row.plan.bytes / 1e6:.1f}",
            number(row.ms, ".4f"),
            number(row.plan.bytes / row.ms / 1e6, ".0f"),
            ratio(row.share, ".0%"),
            ratio(beside(row, rows), ".2f"),
            row.problem,
        )
        for row in rows
    )
    return markdown.table(titles, lines)


def goals(rows: list[Row]) -> str:
    """Each goal, what was reached where it was reached least, and whether that will do."""
    lines = []
    for way, bound in GOALS.items():
        shares = [row.share for row in rows if row.plan.way == way and row.plan.contender == OURS]
        if shares:
            lines.append(
                (f"{way}, share of copy", f">= {bound:.0%}", f"{min(shares):.0%}", min(shares) >= bound)
            )
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        ratio = beside(row, rows)
        if not row.plan.contender.startswith(OURS) and not math.isnan(ratio):
            groups.setdefault(row.plan[:3], []).append(ratio)
    for name, pick, bound in (("fastest", min, FASTEST), ("median", statistics.median, MEDIAN)):
        if groups:
            least = min(pick(group) for group in groups.values())
            lines.append((f"time of the {name} peer / ours", f">= {bound}", f"{least:.2f}", least >= bound))
    return markdown.table(
        ("goal", "bound", "least", "reached"), ((*x, "yes" if y else "no") for *x, y in lines)
    )


def figure(rows: list[Row], path: Path, title: str) -> None:
    """Shares of a copy, a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = [way for way in PASSES if any(row.plan.way == way and row.plan.bytes for row in rows)]
    canvas, axes = pyplot.subplots(1, len(ways), sharey=True, squeeze=False, figsize=(4 * len(ways), 6))
    for way, panel in zip(ways, axes[0], strict=True):
        for name in CONTENDERS:
            mine = [row for row in rows if row.plan.way == way and row.plan.contender == name]
            labels = [f"{row.plan.shape} {row.plan.layout}" for row in mine]
            panel.plot([row.share for row in mine], labels, "o" if name == OURS else ".", label=name)
        panel.set(title=way, xlabel="share of copy", xlim=(0, 1.1))
    axes[0][0].legend(fontsize="small")
    canvas.suptitle(title, fontsize="small")
    canvas.savefig(path, format="png", bbox_inches="tight")
    pyplot.close(canvas)


def tested() -> bool:
    """Whether the tests of the kernels pass on this GPU."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q"]
    return subprocess.run(command, cwd=report.ROOT, check=False).returncode == 0


def write(out: Path, rows: list[Row], facts: dict[str, str], compared: bool) -> None:
    """rotary.json and, if something was compared and matplotlib is here, rotary.png."""
    out.mkdir(parents=True, exist_ok=True)
    content = []
    for row in rows:
        numbers = {"ms": row.ms}
        if compared:
            numbers |= {"copy_ms": row.copy_ms, "share": row.share, "over_ours": beside(row, rows)}
        numbers = {name: None if math.isnan(x) else x for name, x in numbers.items()}
        content.append({**row.plan._asdict(), **numbers, "problem": row.problem})
    report.write_json(out / "rotary.json", {**facts, "rows": content})
    if compared and find_spec("matplotlib"):
        title = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {facts['commit']}"
        report.write_whole(out / "rotary.png", lambda path: figure(rows, path, title))


def main() -> int:
    """Read the flags, test, measure, print and write."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--dry-run", action="store_true", help="list the rows and their bytes")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests, and print no ratios")
    parser.add_argument("--passes", nargs="+", choices=WAYS, default=list(WAYS), metavar="PASS")
    parser.add_argument("--out", type=Path, default=report.ROOT / "runs" / "bench")
    flags = parser.parse_args()
    rows = [plan for plan in plans() if plan.way in flags.passes]
    if flags.dry_run:
        titles = "b s h g d a", "layout", "pass", "contender", "bytes", "here"
        print(markdown.table(titles, ((*plan, CONTENDERS[plan.contender].here) for plan in rows)))
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    compared = not flags.no_tests and tested()
    facts = report.provenance(PACKAGES)
    facts["tests"] = "passed" if compared else "not run" if flags.no_tests else "failed"
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    found = measure(rows, Clock(), "cuda")
    print(show(found, compared))
    if compared:
        print(goals(found))
    write(flags.out, found, facts, compared)
    return 0 if compared or flags.no_tests else 1


if __name__ == "__main__":
    sys.exit(main())
