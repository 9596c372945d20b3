"""A run's folder: the configuration and data that made it, its lock, its checkpoints, runs to start from."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME, SAFE_WEIGHTS_NAME
from omegaconf import OmegaConf
from torch.distributed.fsdp import StateDictType

from rope_mm.files import reason, write_folder, write_text
from rope_mm.training import checkpoint
from rope_mm.training.distributed import all_reduce_max, is_sharded
from rope_mm.training.folder_lock import HOLDER, locked
from rope_mm.training.history import versions

DONE = ("model", "result.json")
MADE = ("checkpoints", "samples", "metrics.jsonl", "index.html", *DONE)
PATIENCE = 10.0  # seconds
# how a checkpoint stores its weights -> the file or folder of the first model
WEIGHTS = {
    "whole": SAFE_WEIGHTS_NAME,
    "sharded": f"{FSDP_MODEL_NAME}_0",
    "gathered by FSDP": f"{FSDP_MODEL_NAME}.bin",
}


@dataclass(frozen=True)
class Identity:
    """What a run's result depends on; a folder with another one is refused.

    Attributes:
        config: the configuration as YAML, keys that no result depends on excepted.
        data: the numbers of rows and a fingerprint of them, by split.
        constant_schedule: whether no rate depends on the number of steps, so that a run may be extended.
        held_out_by_place: whether rows are held out by where they stand, as the first ones of a stream are,
            so that other data could hold out rows that were trained on.
    """

    config: str
    data: Mapping[str, Any]
    constant_schedule: bool = False
    held_out_by_place: bool = False


@contextmanager
def locked_for_all(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """As `locked`, by the main process for all.

    Args:
        output_dir: the folder.
        accelerator: the processes.

    Raises:
        ValueError: as `locked`, in every process. A folder that not all machines share.
    """
    with ExitStack() as stack:
        refusal = [""]
        if accelerator.is_main_process:
            try:
                stack.enter_context(locked(output_dir))
            except ValueError as error:
                refusal = [str(error)]
        if reason := broadcast_object_list(refusal)[0]:
            raise ValueError(reason)
        check_shared(output_dir / HOLDER, accelerator)
        yield


def check_shared(file: Path, accelerator: Accelerator) -> None:
    """Refuse a folder that some process does not see: there a run would begin anew while others resume.

    Args:
        file: that the main process has just written.
        accelerator: the processes.

    Raises:
        ValueError: a process that does not see the file within PATIENCE seconds.
    """
    end = time.monotonic() + PATIENCE  # a network file system may show a new file late
    while not (seen := file.is_file()) and time.monotonic() < end:
        time.sleep(0.1)
    missing = all_reduce_max(accelerator, 0 if seen else accelerator.process_index + 1)
    if missing:
        raise ValueError(
            f"process {missing - 1} does not see the folder {file.parent.absolute()} of process 0; give "
            "--output_dir a folder on a file system that all machines share"
        )


def open_folder(
    output_dir: Path,
    identity: Identity,
    accelerator: Accelerator,
    restart: bool = False,
    extend: bool = False,
    changed_data: bool = False,
) -> None:
    """Write the configuration of a run to its folder; `restart` empties the folder first.

    Args:
        output_dir: the folder.
        identity: all that the run depends on.
        accelerator: the processes, of which the main one writes.
        restart: whether what is there is deleted.
        extend: whether a run may go on with another number of steps although its schedule depends on it.
        changed_data: whether a run may go on with other data.

    Raises:
        ValueError: see `check_folder`.
    """
    if not restart:
        check_folder(output_dir, identity, extend, changed_data)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if restart:
            checkpoint.clear(output_dir / "checkpoints")
            for name in ("samples", "model"):
                shutil.rmtree(output_dir / name, ignore_errors=True)
            for name in ("result.json", "index.html", "history.jsonl", "data.png"):
                (output_dir / name).unlink(missing_ok=True)
        elif steps_of(output_dir) not in (None, read_config(identity.config).get("steps")):
            (output_dir / "result.json").unlink(missing_ok=True)  # of fewer steps
        write_text(output_dir / "data.json", json.dumps(identity.data, indent=1))
        write_text(output_dir / "run.yaml", identity.config)
        write_text(output_dir / "versions.json", json.dumps(versions(), indent=1))
    accelerator.wait_for_everyone()


def check_folder(
    output_dir: Path, identity: Identity, extend: bool = False, changed_data: bool = False
) -> None:
    """Refuse a folder with anything that this run would overwrite and cannot resume from.

    Args:
        output_dir: the folder.
        identity: of this run.
        extend: see `open_folder`.
        changed_data: see `open_folder`.

    Raises:
        ValueError: with the keys that differ from another run's, or with the files of no run.
    """
    remedy = "choose another --output_dir, or start anew with --restart"
    known = (output_dir / "run.yaml").exists()
    begun = checkpoint.latest(output_dir / "checkpoints") is not None
    lacking, lost = ("checkpoint", DONE) if known else ("run.yaml", MADE)
    found = [name for name in lost if (output_dir / name).exists()]
    if known and (begun or found):  # of a run that ended before its first checkpoint nothing can be lost
        check_config(output_dir, identity, extend, remedy)
        check_data(output_dir, identity, changed_data, remedy)
    if found and not (known and begun):
        raise ValueError(f"{output_dir} holds {', '.join(found)}, but no {lacking} to resume from; {remedy}")


def check_config(output_dir: Path, identity: Identity, extend: bool, remedy: str) -> None:
    """Refuse a folder of another configuration; another number of steps extends the run where it can.

    Args:
        output_dir: a run's folder.
        identity: of this run.
        extend: whether the schedule may change.
        remedy: what to do about another configuration.

    Raises:
        ValueError: with all keys that differ, `steps` only where it may not.
    """
    old = (output_dir / "run.yaml").read_text(encoding="utf-8")
    if old == identity.config:
        return
    before, now = read_config(old), read_config(identity.config)
    steps, more = before.get("steps"), now.get("steps")
    found = differences(before, now)
    longer = None not in (steps, more)
    if longer and (extend or identity.constant_schedule or found.keys() == {"steps"}):
        found.pop("steps", None)
    if found:
        pairs = "; ".join(f"{there!r} there, {here!r} here" for there, here in found.values())
        raise ValueError(f"{output_dir} holds a run of another configuration ({pairs}); {remedy}")
    if steps == more or more is None:
        return
    newest = checkpoint.latest(output_dir / "checkpoints")
    if newest is not None and checkpoint.step_of(newest) > more:
        raise ValueError(
            f"{output_dir} holds a run of {checkpoint.step_of(newest)} steps already, more than steps "
            f"{more}; {remedy}"
        )
    if newest is not None and not (extend or identity.constant_schedule):
        raise ValueError(
            f"{output_dir} holds a run of {steps} steps, and its learning rate follows a schedule that ends "
            f"there; add --extend to train to step {more} at the rates of a run of that length, or {remedy}"
        )


def check_data(output_dir: Path, identity: Identity, changed_data: bool, remedy: str) -> None:
    """Refuse to resume on other data.

    Args:
        output_dir: a run's folder.
        identity: of this run.
        changed_data: whether it may go on nevertheless.
        remedy: what else to do.

    Raises:
        ValueError: with the numbers of rows.
    """
    stored = output_dir / "data.json"
    if (changed_data and not identity.held_out_by_place) or not stored.exists():
        return
    old = json.loads(stored.read_text(encoding="utf-8"))
    new = json.loads(json.dumps(identity.data))
    if old == new:
        return
    there, here = (
        describe_data({name: part for name, part in data.items() if old.get(name) != new.get(name)}) or "none"
        for data in (old, new)
    )
    way = "--data.changed true goes on with the new data"
    if identity.held_out_by_place:
        way = "it cannot go on, as its held-out rows could be those trained on; give the data a test split"
    raise ValueError(
        f"{output_dir} holds a run on other data ({there} there, {here} here); {way}; or {remedy}"
    )


def describe_data(data: Mapping[str, Any]) -> str:
    """The splits of a data fingerprint, in words."""
    files = {name: f" from {part['files']} files" if "files" in part else "" for name, part in data.items()}
    return ", ".join(
        f"{name}: {part['rows']} rows{files[name]}, of content {part['digest'][:8]}"
        for name, part in data.items()
    )


def steps_of(output_dir: Path) -> int | None:
    """The number of steps that the run of a folder was last started for."""
    path = output_dir / "run.yaml"
    return read_config(path.read_text(encoding="utf-8")).get("steps") if path.exists() else None


def read_config(text: str) -> dict[str, Any]:
    """The keys of a configuration in YAML."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))


def is_done(output_dir: Path, config: str) -> bool:
    """Whether a folder holds the result of a run of this configuration."""
    path = output_dir / "run.yaml"
    if not path.exists() or not (output_dir / "result.json").exists():
        return False
    return path.read_text(encoding="utf-8") == config


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], group: str = ""
) -> dict[str, tuple[str, str]]:
    """What each of two configurations says of the keys in which they differ, by dotted key.

    Args:
        old: a configuration.
        new: another one.
        group: prefix of the keys.
    """
    found = {}
    for key in dict.fromkeys([*old, *new]):
        name, before, now = f"{group}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found |= differences(before, now, f"{name}.")
        elif (key in old) != (key in new) or before != now:
            there, here = (f"{name}: {part[key]}" if key in part else f"no {name}" for part in (old, new))
            found[name] = there, here
    return found


def resume(output_dir: Path, accelerator: Accelerator) -> int:
    """Load the newest checkpoint, if there is one; the step to continue at.

    Raises:
        ValueError: a checkpoint that is not whole, of weights that are stored in another way, or of another
            model.
    """
    newest = checkpoint.latest(output_dir / "checkpoints")
    if newest is None:
        return 0
    checkpoint.verify(newest)
    check_weights(newest, accelerator)
    try:
        accelerator.load_state(str(newest))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {newest} does not fit this model ({reason(error)}); choose another --output_dir, or "
            "start anew with --restart"
        ) from error
    return checkpoint.step_of(newest)


def check_weights(path: Path, accelerator: Accelerator) -> None:
    """Refuse a checkpoint whose weights this command cannot read; the number of processes does not matter.

    Args:
        path: of the checkpoint.
        accelerator: of the command.

    Raises:
        ValueError: with how its weights are stored.
    """
    own = "whole"
    if is_sharded(accelerator):
        kind = accelerator.state.fsdp_plugin.state_dict_type  # pyright: ignore[reportOptionalMemberAccess]
        own = "sharded" if kind == StateDictType.SHARDED_STATE_DICT else "gathered by FSDP"
    stored = next((kind for kind, name in WEIGHTS.items() if (path / name).exists()), own)
    if stored != own:
        raise ValueError(
            f"checkpoint {path} has weights that are stored {stored}, and this command reads {own} ones; "
            "give it the configuration of accelerate that the run began with, on any number of processes"
        )


def save(output_dir: Path, step: int, accelerator: Accelerator) -> None:
    """Write the checkpoint of a step, whole or not at all.

    Args:
        output_dir: of the run.
        step: number of steps done.
        accelerator: of all models and states.
    """
    checkpoint.save(
        output_dir / "checkpoints",
        step,
        lambda path: accelerator.save_state(str(path)),
        main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )


def write_model(output_dir: Path, write: Callable[[Path], object], accelerator: Accelerator) -> None:
    """Write the model of a run to OUTPUT_DIR/model: all of it, or where that fails, nothing.

    Args:
        output_dir: the run's folder.
        write: fills a folder.
        accelerator: the processes.
    """
    main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    write_folder(output_dir / "model", write, main=main, wait=wait)


def check_initial_run(folder: Path, config: str, kept: Sequence[str]) -> None:
    """Refuse to initialise a run from a folder without a finished run of the same kind of model.

    Args:
        folder: of the run to start from.
        config: of the new run, as YAML.
        kept: dotted keys that both must agree on.

    Raises:
        ValueError: with the first key that differs; a checkpoint that is not whole.
    """
    made, newest = folder / "run.yaml", checkpoint.latest(folder / "checkpoints")
    if not (folder / "result.json").exists() or newest is None:
        raise ValueError(
            f"init_from {folder} holds no finished run; give the output_dir of one, or finish it"
        )
    checkpoint.verify(newest)
    old, new = OmegaConf.load(made), OmegaConf.create(config)
    for key in kept:
        there, here = OmegaConf.select(old, key), OmegaConf.select(new, key)
        if there != here:
            raise ValueError(
                f"init_from {folder} has another {key} ({there} there, {here} here), which must be kept"
            )


def load_initial_run(folder: Path, accelerator: Accelerator) -> None:
    """Load the last checkpoint of a run that `check_initial_run` let pass.

    Raises:
        ValueError: weights that are stored in another way.
    """
    newest = cast(Path, checkpoint.latest(folder / "checkpoints"))
    check_weights(newest, accelerator)
    accelerator.load_state(str(newest))
