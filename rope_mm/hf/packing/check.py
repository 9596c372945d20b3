"""Whether packed examples give the logits and the loss of each alone, for any collator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rope_mm.hf.packing.examples import IGNORED, Example, encode_example
from rope_mm.hf.packing.isolation import forward, special_tokens, tolerance
from rope_mm.hf.packing.leaks import (
    MIXED,
    VARLEN,
    blocks_are_moved,
    is_flash,
    mixes_image_blocks,
    takes_lengths,
)
from rope_mm.hf.packing.rows import Placer, make_placer, text_model

Batch = dict[str, Any]
Spot = tuple[int, int]  # the row and the column of an example's first token


@dataclass(frozen=True)
class PackingReport:
    """How examples in a packed batch differ from each alone; it prints as one sentence.

    Attributes:
        differences: the largest difference of each example's logits; None where the batch has not all of it.
        size: the largest logit.
        leaks: the numbers of the examples whose logits change when the text of others does.
        loss: of the batch, and as the logits of each alone give it; None without labels.
        ok: whether all differences are rounding.
        sentence: what is wrong and what to do, or how large the differences are.
    """

    differences: list[float | None]
    size: float
    leaks: list[int]
    loss: tuple[float, float] | None
    ok: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Trial:
    """What is compared: a model, examples, and where they stand in a batch.

    Attributes:
        model: the model.
        placer: of the model.
        examples: as the model reads each alone.
        spots: where each begins; None where the batch has not all of it.
        alone: the logits (s, n) of each alone.
        in_trainer: whether the outer config's cache is off, as the Trainer leaves it.
    """

    model: Any
    placer: Placer
    examples: Sequence[Example]
    spots: Sequence[Spot | None]
    alone: Sequence[Tensor]
    in_trainer: bool

    def found(self) -> Iterator[tuple[int, Example, Spot]]:
        """The number, the example and the spot of each that the batch has."""
        for number, (example, spot) in enumerate(zip(self.examples, self.spots, strict=True)):
            if spot is not None:
                yield number, example, spot

    @property
    def size(self) -> float:
        """The largest logit."""
        return max(x.abs().max().item() for x in self.alone)

    @property
    def most(self) -> float:
        """The largest difference that rounding makes."""
        return tolerance(self.alone[0]) * self.size

    @property
    def rows(self) -> int:
        """The rows of position_ids."""
        return len(self.placer.place(self.examples[0]))

    def part(self, x: Tensor, example: Example, spot: Spot) -> Tensor:
        """An example's part (s, ...) of (b, s, ...)."""
        return x[spot[0], spot[1] : spot[1] + len(example)]

    def logits(self, batch: Batch) -> Tensor:
        """Of a batch."""
        return forward(self.model, batch, self.in_trainer).logits

    def differences(self, batch: Batch) -> list[float | None]:
        """The largest of each example."""
        logits = self.logits(batch)
        result: list[float | None] = [None] * len(self.examples)
        for number, example, spot in self.found():
            change = self.part(logits, example, spot) - self.alone[number]
            result[number] = float(change.abs().max())
        return result

    def leaks(self, batch: Batch) -> list[int]:
        """The examples whose logits change when the text of others does."""
        before, result = self.logits(batch), set()
        order = sorted(self.found(), key=lambda one: one[2])
        for parity in (0, 1):
            ids = batch["input_ids"].clone()
            for _, example, spot in order[parity::2]:
                self.part(ids, example, spot).copy_(other_text(example, self.placer.config))
            after = self.logits({**batch, "input_ids": ids})
            for number, example, spot in order[1 - parity :: 2]:
                change = self.part(after - before, example, spot).abs().max().item()
                result |= {number} if change > self.most else set()
        return sorted(result)

    def positions(self, batch: Batch, whole: bool) -> Batch:
        """The batch with right position_ids, or with right token positions alone."""
        right = torch.zeros(self.rows, *batch["input_ids"].shape, dtype=torch.float64)
        for _, example, (row, start) in self.found():
            right[:, row, start : start + len(example)] = self.placer.place(example)
        given, axes = batch.get("position_ids"), self.rows - 1
        if not whole and given is not None and given.dim() == 3 and len(given) >= axes:
            right[1:] = given[len(given) - axes :].cpu()
        right = right if self.placer.scheme else right.long()
        return {**batch, "position_ids": right if axes else right[0]}

    def mixes_images(self, batch: Batch) -> bool:
        """Whether the model's mask of images moves blocks of one example into another, at right positions."""
        numbers = self.positions(batch, whole=True)["position_ids"]
        numbers = (numbers if numbers.dim() == 2 else numbers[0]).long()
        return mixes_image_blocks(type(self.model), self.placer.config) and blocks_are_moved(numbers, batch)

    def lengths(self, batch: Batch) -> Batch:
        """The batch with the cumulative lengths of its examples."""
        s = batch["input_ids"].shape[1]
        edges = {0, batch["input_ids"].numel()} | {row * s for row in range(len(batch["input_ids"]))}
        for _, example, (row, start) in self.found():
            edges |= {row * s + start, row * s + start + len(example)}
        ends = torch.tensor(sorted(edges), dtype=torch.int32)
        most = int(ends.diff().max())
        return {**batch, **dict(zip(VARLEN, (ends, ends, most, most), strict=True))}


def packed_equals_alone(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collator: Callable[[Any], Mapping[str, Any]],
    in_trainer: bool = True,
) -> PackingReport:
    """Run a batch of a collator, and each of its examples alone, and say what is wrong.

    Examples are found in the batch by their tokens. Whether one sees another is measured: the text of the
    others is changed. What would mend it is tried on the batch, so that the sentence names what helped.

    Args:
        model: a causal model of transformers.
        examples: some that differ, as a data set has them; with images, if it has any.
        collator: a PackingCollator, or any function that makes a batch of examples.
        in_trainer: run it as transformers' Trainer does, with the cache off in the outer config only; False
            for a plain forward.

    Returns:
        The report, whose `ok` and sentence are for a test: `assert report.ok, report`.

    Raises:
        ValueError: examples that cannot be read alone.
    """
    base, batch = text_model(model), dict(collator(examples))
    placer = make_placer(model)
    read = getattr(collator, "prepare", None) or (
        lambda one: encode_example(getattr(collator, "processor", None), placer.config, placer.known, one)
    )
    whole = [one for one in map(read, examples) if one is not None]
    spots = find_examples(batch["input_ids"], whole)
    alone = [forward(base, dict(one.inputs()), False).logits[0] for one in whole]
    trial = Trial(base, placer, whole, spots, alone, in_trainer)
    try:
        out = forward(base, batch, in_trainer)
    except Exception as error:  # whatever a batch that does not fit raises
        wrong = f"the model does not take this batch ({type(error).__name__}: {error})"
        return PackingReport([None] * len(whole), trial.size, [], None, False, wrong)
    differences, leaks = trial.differences(batch), trial.leaks(batch)
    loss = None
    if batch.get("labels") is not None and getattr(out, "loss", None) is not None:
        loss = out.loss.item(), loss_alone(trial, batch["labels"])
    wrong = explain(trial, batch, differences, leaks, loss)
    known = [x for x in differences if x is not None]
    good = (
        f"packed equals alone: logits up to {trial.size:.2g} differ by at most {max(known, default=0.0):.1e}"
    )
    return PackingReport(differences, trial.size, leaks, loss, not wrong, wrong or good)


def find_examples(ids: Tensor, examples: Sequence[Example]) -> list[Spot | None]:
    """Where in ids (b, s) the tokens of each example stand, each in a place of its own."""
    taken, spots = torch.zeros_like(ids, dtype=torch.bool), []
    for example in examples:
        n, mine = len(example), example.tokens["input_ids"].to(ids)
        spot = None
        if n <= ids.shape[1]:
            free = ~taken.unfold(1, n, 1).any(-1)
            places = (free & (ids.unfold(1, n, 1) == mine).all(-1)).nonzero().tolist()
            if places:
                spot = tuple(places[0])
                taken[spot[0], spot[1] : spot[1] + n] = True
        spots.append(spot)
    return spots


def other_text(example: Example, config: Any) -> Tensor:
    """The example's ids with other ids in the place of its text; special tokens and images stay."""
    ids, special = example.tokens["input_ids"], special_tokens(config)
    size = config.get_text_config().vocab_size
    usual = [token for token in range(min(size, 4096)) if token not in special]
    text = (example.kinds == 0) & ~torch.isin(ids, torch.tensor(sorted(special) or [-1]))
    others = torch.tensor(usual)[(ids + len(usual) // 2) % len(usual)]
    return others.where(text, ids)


def loss_alone(trial: Trial, labels: Tensor) -> float:
    """The mean over the labels (b, s) of a batch, by the logits of each example alone."""
    losses, count = 0.0, 0
    for number, example, spot in trial.found():
        mine = trial.part(labels, example, spot)[1:].to(trial.alone[number].device)
        logits = trial.alone[number][:-1].float()
        losses += cross_entropy(logits, mine, ignore_index=IGNORED, reduction="sum").item()
        count += int((mine != IGNORED).sum())
    return losses / max(count, 1)


def explain(
    trial: Trial,
    batch: Batch,
    differences: Sequence[float | None],
    leaks: Sequence[int],
    loss: tuple[float, float] | None,
) -> str:
    """What is wrong with a batch, in one sentence; empty where nothing is."""
    if missing := [number for number, x in enumerate(differences) if x is None]:
        return f"the batch has not all tokens of examples {missing} in one piece"
    worst = max(x for x in differences if x is not None)
    first = next((number for number, x in enumerate(differences) if x is not None and x > trial.most), None)
    begins = [(number, *spot) for number, _, spot in trial.found() if spot[1]]
    crossing = [number for number, *spot in begins if batch_label(batch, *spot) != IGNORED]
    if leaks:
        how = f"logits of up to {trial.size:.2g} differ by {worst:.1e}"
        return f"example {leaks[0]} sees the examples before it ({how}): {remedy(trial, batch)}"
    if first is not None:
        right = max(x or 0.0 for x in trial.differences(trial.positions(batch, whole=True)))
        if right <= trial.most:
            why = "its position_ids are not those that it has alone; make them for each example"
        elif trial.mixes_images(batch):
            why = f"{type(trial.model).__name__} {MIXED}"
        else:
            why = "pixels, grids or other inputs are not its own; give them in the order of the rows"
        return f"example {first} sees no other, but differs by {differences[first]:.1e} from alone: {why}"
    if crossing:
        return (
            f"the first token of example {crossing[0]} has a label, which the last token of the example "
            f"before it is to predict; make it {IGNORED}"
        )
    if loss is not None and abs(loss[0] - loss[1]) > trial.most:
        return f"logits are those of each alone, but the loss is {loss[0]:.4g}, not {loss[1]:.4g}"
    return ""


def batch_label(batch: Batch, row: int, column: int) -> int:
    """The label of a token; that of no prediction where the batch has none."""
    labels = batch.get("labels")
    return IGNORED if labels is None else int(labels[row, column])


def remedy(trial: Trial, batch: Batch) -> str:
    """What keeps the examples of a batch apart: the fewest changes that do, tried one after another."""
    config, mask = trial.placer.config, batch.get("attention_mask")
    changes: dict[str, Callable[[Batch], Batch]] = {}
    if batch.get("use_cache") is not False:
        changes["put use_cache=False in the batch (the Trainer switches the outer config's off alone)"] = (
            lambda one: {**one, "use_cache": False}
        )
    if getattr(mask, "ndim", 0) == 2:
        changes["leave attention_mask (b, s) out"] = lambda one: {**one, "attention_mask": None}
    rows = (
        f"position_ids ({trial.rows}, b, s) whose row 0 starts"
        if trial.rows > 1
        else ("position_ids (b, s) that start")
    )
    changes[f"give {rows} at 0 in each example"] = lambda one: trial.positions(one, whole=False)
    if is_flash(config) and not takes_lengths(batch):
        changes[f"give {', '.join(VARLEN)}"] = trial.lengths
    for count in range(1, len(changes) + 1):
        for chosen in combinations(changes, count):
            trying = batch
            for name in chosen:
                trying = changes[name](trying)
            try:
                if not trial.leaks(trying):
                    return " and ".join(chosen)
            except Exception:  # a batch that the model does not take mends nothing
                continue
    return (
        f"{type(trial.model).__name__} by {config.get_text_config()._attn_implementation} does not keep them "
        "apart whatever the batch says; take another attn_implementation, or pad"
    )
