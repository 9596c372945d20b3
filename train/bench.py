"""What training costs: steps beside transformers', packing, memory by length, rotary's share, threads.

    python train/bench.py            all tables
    python train/bench.py --quick    small sizes and few rounds
    python train/bench.py --output F writes the tables to F as well

A step is forward, backward and AdamW, in one thread. Contenders take turns in one process, and a time is the
thread's own. A ratio is the median over the rounds of (median of one's turn) / (median of the other's); the
spread is its quartiles.
"""

import rope_mm.checks.installed  # noqa: F401 isort: skip

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, cast

import adversarial
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from rope_mm.analysis import markdown
from rope_mm.data import make_generator
from rope_mm.data.documents import Document, Visual
from rope_mm.files import write_text
from rope_mm.models import RopeMMForConditionalGeneration, RopeMMProcessor, load_tokenizer, read_config
from rope_mm.training.collator import Packer
from rope_mm.training.config import load
from rope_mm.training.image_heads import from_noise
from rope_mm.training.rotary_profile import measure_share
from rope_mm.training.threads import fastest, speed_of

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "bench"))  # whose benches are run alike
import cpu
import report

CONFIGS = Path(__file__).parents[1] / "configs"
GOAL = 1.1  # of a step over Llama's
STEP_GOAL = 0.67  # of an adversarial step on words over one on bytes
THREADS_SECONDS = 5.0  # of each number of threads
VOCAB = len(load_tokenizer())


class Size(NamedTuple):
    """A model's sizes, and the rows and the length of what it reads in a step."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    length: int

    @property
    def model(self) -> str:
        """Its width and layers, as the tables write them."""
        return f"{self.width} x {self.layers}"

    def settings(self) -> dict[str, Any]:
        """As transformers' configs name them."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "vocab_size": VOCAB,
            "tie_word_embeddings": True,
        }


SMALL = Size(128, 256, 3, 4, 4, 32, 128)  # model, batch and length of configs/pretrain/tiny.yaml
LARGE = Size(256, 768, 4, 8, 4, 4, 512)


def ours(size: Size) -> nn.Module:
    """RopeMM of a size."""
    return RopeMMForConditionalGeneration(read_config(**size.settings())).train()


MODELS: dict[str, Callable[[Size], nn.Module]] = {
    "RopeMM": ours,
    "Llama": lambda size: LlamaForCausalLM(LlamaConfig(**size.settings())).train(),
    "Qwen3": lambda size: Qwen3ForCausalLM(Qwen3Config(**size.settings())).train(),
}


def trainer(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    """A step of a model on these inputs."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> None:
        loss = model(**inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def spread(times: dict[str, list], one: str, other: str) -> tuple[float, float, float]:
    """Median and quartiles of a ratio over the rounds: (low, median, high)."""
    low, median, high = statistics.quantiles(
        [x / y for x, y in zip(times[one], times[other], strict=True)], n=4
    )
    return low, median, high


def steps_table(sizes: list[Size], rounds: int) -> str:
    """RopeMM's step over those of transformers' models, on text alone."""
    rows = []
    for size in sizes:
        ids = torch.randint(VOCAB - 2, (size.rows, size.length), generator=make_generator("bench"))
        inputs = {"input_ids": ids, "labels": ids}
        times = cpu.alternate(
            {name: trainer(make(size), inputs) for name, make in MODELS.items()}, rounds, time.thread_time
        )
        for other in ("Llama", "Qwen3"):
            low, ratio, high = spread(times, "RopeMM", other)
            ms = (f"{1e3 * statistics.median(times[name]):.1f}" for name in ("RopeMM", other))
            goal = f"<= {GOAL}" + ", missed" * (ratio > GOAL) if other == "Llama" else ""
            shape = size.model, f"{size.rows} x {size.length}"
            rows.append((*shape, *ms, other, f"{ratio:.2f} ({low:.2f} to {high:.2f})", goal))
    return markdown.table(
        ("width x layers", "tokens", "ms", "ms of", "the other", "ratio (quartiles)", "goal"), rows
    )


def uneven(count: int, longest: int) -> list[Document]:
    """Documents of text around an image, short ones more often than long ones.

    Args:
        count: number of documents.
        longest: bytes of text before the image, at most."""
    lengths, pixels = random.Random(0), torch.zeros(1, 8, 8)
    sizes = [round(longest ** lengths.random()) for _ in range(count)]
    return [["a" * size, Visual(pixels), "b" * (1 + size // 2)] for size in sizes]


def packing_table(size: Size, rounds: int) -> str:
    """Tokens a second of documents packed, and of the same padded to the longest."""
    model = ours(size)
    processor = RopeMMProcessor(load_tokenizer())
    documents = uneven(24, size.length // 2)
    pack = Packer(processor, size.length, from_noise)(documents, [make_generator("bench")] * len(documents))
    read = [[part if isinstance(part, str) else part.pixels for part in d] for d in documents]
    padded = dict(processor(documents=read, return_labels=True, padding_side="right"))
    ways = {"packed": pack.inputs() | {"labels": pack.labels}, "padded": padded}
    times = cpu.alternate(
        {name: trainer(model, inputs) for name, inputs in ways.items()}, rounds, time.thread_time
    )
    tokens = {name: int(inputs["attention_mask"].sum()) for name, inputs in ways.items()}
    rows = []
    for name, inputs in ways.items():
        speed = tokens[name] / statistics.median(times[name])
        rows.append((name, " x ".join(map(str, inputs["input_ids"].shape)), tokens[name], f"{speed:.0f}"))
    low, ratio, high = (x * tokens["packed"] / tokens["padded"] for x in spread(times, "padded", "packed"))
    said = f"packed over padded: {ratio:.2f} ({low:.2f} to {high:.2f}) times the tokens a second"
    table = markdown.table(("way", "rows", "tokens", "tokens/s"), rows)
    return f"width x layers: {size.model}\n\n{table}\n\n{said}"


def peak_memory(step: Callable[[], None], device: str) -> int:
    """Bytes that a step allocates at most, over what there is before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = cast(Any, seen.profiler).kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds(step: Callable[[], None], device: str) -> float:
    """Of a step, its median of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter() if device == "cuda" else time.thread_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() if device == "cuda" else time.thread_time()) - start)
    return statistics.median(found)


# backend, whether patches see each other, which takes a mask, and where it trains
WAYS = {
    "sdpa, text alone (no mask)": ("sdpa", False, ("cpu", "cuda")),
    "sdpa, with images (a mask of s x s)": ("sdpa", True, ("cpu", "cuda")),
    "flex_attention, with images": ("flex_attention", True, ("cuda",)),
    "flash_attention_2, text alone": ("flash_attention_2", False, ()),
}


def length_rows(way: str, size: Size, lengths: list[int], device: str) -> list[tuple]:
    """Memory and time of one row of each length, in one way of attention."""
    backend, images, where = WAYS[way]
    if device not in where:
        return [(way, "", "not measured", "", "")]
    model, rows = ours(size).to(device), []
    cast(PreTrainedModel, model).set_attn_implementation(backend)
    for length in lengths:
        ids = torch.randint(VOCAB - 2, (1, length), generator=make_generator("bench")).to(device)
        blocks: Tensor = torch.arange(length, device=device)[None] // 16
        step = trainer(model, {"input_ids": ids, "labels": ids} | ({"block_ids": blocks} if images else {}))
        step()  # makes the optimiser's state
        taken, peak = seconds(step, device), peak_memory(step, device)
        rows.append(
            (way, length, f"{peak / 2**20:.0f}", f"{peak / 2**10 / length:.0f}", f"{1e3 * taken:.0f}")
        )
    return rows


def lengths_table(size: Size, lengths: list[int]) -> str:
    """Length of a row against memory and time of its step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for way in WAYS for row in length_rows(way, size, lengths, device)]
    table = markdown.table(("attention", "tokens", "MiB at most", "KiB a token", "ms"), rows)
    return f"width x layers: {size.model}\n\n{table}"


def share_lines(sizes: list[Size]) -> str:
    """Rotary's share of a step on text, by size."""
    lines = []
    for size in sizes:
        ids = torch.randint(VOCAB - 2, (size.rows, size.length), generator=make_generator("bench"))
        step = trainer(ours(size), {"input_ids": ids, "labels": ids})
        step()
        lines.append(f"{size.model}, {size.rows} x {size.length} tokens: {measure_share(step, 3)}")
    return "\n\n".join(lines)


def make_tables(
    sizes: list[Size], rounds: int, lengths: list[int], threads: int
) -> dict[str, Callable[[], str]]:
    """Titles, and what measures and writes the table below each."""
    return {
        "A step on text": partial(steps_table, sizes, rounds),
        "Packed and padded": partial(packing_table, sizes[-1], rounds),
        "Length, memory and time": partial(lengths_table, sizes[-1], lengths),
        "Rotary's share": partial(share_lines, sizes),
        "An adversarial step": partial(adversarial_table, rounds),
        "Threads beside another job": partial(threads_table, sizes[0], threads),
    }


def adversarial_step(tokenizer: str, flags: Iterable[str] = ()) -> Callable[[], object]:
    """A step of digits.yaml, with captions of this tokenizer's tokens.

    Args:
        tokenizer: "words" or "bytes".
        flags: that change the configuration.
    """
    here = ["--config", str(CONFIGS / "adversarial" / "digits.yaml"), "--tokenizer", tokenizer, *flags]
    training = adversarial.Training(load(adversarial.Adversarial, here), Accelerator(cpu=True))
    steps = count()
    return lambda: training.step(next(steps))


def adversarial_table(rounds: int, flags: Iterable[str] = ()) -> str:
    """A step on captions of words over one on captions of bytes."""
    names = ("words", "bytes")
    steps = {name: adversarial_step(name, flags) for name in names}
    times = cpu.alternate(steps, rounds, time.thread_time)
    low, ratio, high = spread(times, *names)
    ms = (f"{1e3 * statistics.median(times[name]):.1f}" for name in names)
    goal = f"<= {STEP_GOAL}" + ", missed" * (ratio > STEP_GOAL)
    row = ("digits.yaml", *ms, f"{ratio:.2f} ({low:.2f} to {high:.2f})", goal)
    return markdown.table(("configuration", "words, ms", "bytes, ms", "ratio (quartiles)", "goal"), [row])


@contextmanager
def busy_core() -> Iterator[None]:
    """Another job that holds a core meanwhile."""
    job = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        job.kill()
        job.wait()


def threads_table(size: Size, most: int) -> str:
    """Steps a second by wall clock, of chosen threads and of each number of threads, beside another job."""
    before = torch.get_num_threads()
    ids = torch.randint(VOCAB - 2, (size.rows, size.length), generator=make_generator("bench"))
    step = trainer(ours(size), {"input_ids": ids, "labels": ids})
    step()
    with busy_core():
        chosen = fastest(most, speed_of)
        found = {}
        for number in {1, most, chosen}:
            torch.set_num_threads(number)
            start, steps = time.perf_counter(), 0
            while (taken := time.perf_counter() - start) < THREADS_SECONDS or not steps:
                step()
                steps += 1
            found[number] = steps / taken
    torch.set_num_threads(before)
    ratio = max(found.values()) / found[chosen]
    rows = [
        (number, f"{speed:.2f}", "chosen" * (number == chosen)) for number, speed in sorted(found.items())
    ]
    goal = "<= 2" + ", missed" * (ratio > 2)
    table = markdown.table(("threads", "steps/s", ""), rows)
    return f"{table}\n\nthe best over the chosen: {ratio:.2f}, goal {goal}"


def publish(parts: Iterable[str], output: Path | None) -> None:
    """Print each part when it is made, and write all so far to a file, if one is given."""
    said: list[str] = []
    for part in parts:
        print(part, flush=True)
        said.append(part + "\n")
        if output:
            write_text(output, "".join(said))


def main() -> None:
    """Read the flags, measure, publish the tables."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, help="a file for the tables")
    flags = parser.parse_args()
    if flags.rounds < 2:
        parser.error(f"--rounds must be at least 2, which have quartiles, not {flags.rounds}")
    torch.set_num_threads(1)
    rounds = 4 if flags.quick else flags.rounds
    sizes = [SMALL] if flags.quick else [SMALL, LARGE]
    lengths = [256, 512, 1024] if flags.quick else [512, 1024, 2048, 4096]
    found = report.provenance(("torch", "transformers"))
    where = "\n".join(f"- {key}: {value}" for key, value in found.items())
    tables = make_tables(sizes, rounds, lengths, os.cpu_count() or 1).items()
    publish(chain([where], (f"\n## {title}\n\n{make()}" for title, make in tables)), flags.output)


if __name__ == "__main__":
    main()
