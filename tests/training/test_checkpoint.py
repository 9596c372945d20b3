import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from rope_mm.files import list_files, write_file, write_folder, write_text
from rope_mm.training.checkpoint import MANIFEST, clear, latest, save, step_of, verify
from rope_mm.training.ema import Ema


def state(step):
    def write(path):
        (path / "model.safetensors").write_bytes(bytes([step]) * 2000)
        (path / "sampler").mkdir()
        (path / "sampler" / "state.json").write_text(str(step))

    return write


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "none") is None
    for step in (9, 10, 1_000_000):
        save(tmp_path, step, state(step % 256))
    found = latest(tmp_path)
    assert found == tmp_path / "step-1000000" and step_of(found) == 1_000_000
    verify(found)


def test_older_checkpoints_are_deleted_and_other_files_kept(tmp_path):
    (tmp_path / "step-notes").mkdir()
    for step in range(5):
        save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004", "step-notes"]
    clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-notes"]


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 1, state(1), keep=0)


def test_a_saved_step_is_not_overwritten(tmp_path):
    save(tmp_path, 1, state(1))
    save(tmp_path, 1, state(2))
    assert (tmp_path / "step-000001" / "sampler" / "state.json").read_text() == "1"


def test_a_writer_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 1, state(1))

    def full_disk(path):
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2, full_disk)
    assert latest(tmp_path) == tmp_path / "step-000001"
    save(tmp_path, 3, state(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def truncate(path):
    (path / "model.safetensors").write_bytes(b"x" * 10)


def change(path):
    (path / "model.safetensors").write_bytes(b"x" * 2000)


def lose(path):
    (path / "sampler" / "state.json").unlink()


def tear(path):
    (path / MANIFEST).write_text('{"model.safe')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "model.safetensors has 10 bytes, its manifest says 2000;"),
        (change, "model.safetensors is not what was written;"),
        (lose, "sampler/state.json is missing;"),
        (tear, "it has no readable manifest.json;"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path, harm, message):
    path = save(tmp_path, 1, state(1))
    harm(path)
    said = f"checkpoint {path} is damaged: {message} delete it"
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*--restart"):
        verify(path)


def test_all_processes_write_and_the_main_one_finishes(tmp_path):
    calls = []
    save(
        tmp_path,
        1,
        lambda path: calls.append(f"write in {path.name}"),
        main=False,
        wait=lambda: calls.append("wait"),
    )
    assert calls == ["wait", "write in .step-000001.partial", "wait", "wait"]
    assert latest(tmp_path) is None


# dies at the n-th call to the file system, for every n; forked, since an import takes longer than a save
KILLED = """
import os, signal, sys
from pathlib import Path
from rope_mm.files import write_text
from rope_mm.training.checkpoint import latest, save, step_of, verify

os.fsync = lambda handle: None  # slow, and a kill loses nothing that was written

def content(step):
    def write(path):
        (path / "a").mkdir()
        for name in ("model", "a/state"):
            (path / name).write_bytes(bytes([step]) * 100)
    return write

def act(folder):
    for step in (3, 4):
        save(folder, step, content(step), keep=1)
    write_text(folder / "run.yaml", "new")

def die_at(n):
    left = [n]
    def hook(event, args):
        if event == "open" or event.startswith(("os.", "shutil.", "pathlib.")):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root, deaths, steps = Path(sys.argv[1]), 0, set()
for n in range(1, 10_000):
    folder = root / str(n)
    folder.mkdir()
    save(folder, 2, content(2))
    write_text(folder / "run.yaml", "old")
    child = os.fork()
    if not child:
        die_at(n)
        act(folder)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    newest = latest(folder)
    verify(newest)
    steps.add(step_of(newest))
    assert (newest / "a/state").read_bytes() == bytes([step_of(newest)]) * 100
    assert (folder / "run.yaml").read_text() in ("old", "new")
    save(folder, 5, content(5), keep=1)
    write_text(folder / "run.yaml", "next")
    assert sorted(os.listdir(folder)) == ["run.yaml", "step-000005"], os.listdir(folder)
    if not killed:
        break
    deaths += 1
print(deaths, sorted(steps))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork, no SIGKILL")
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    deaths, steps = done.stdout.split(maxsplit=1)
    assert int(deaths) > 40 and steps.strip() == "[2, 3, 4]"


def test_the_state_of_an_accelerator_is_a_checkpoint(tmp_path):
    def start():
        torch.manual_seed(0)
        accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
        model, adam = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
        ema = Ema(model)
        accelerator.register_for_checkpointing(ema)
        return accelerator, model, adam, ema

    accelerator, model, adam, ema = start()
    model(torch.ones(2)).sum().backward()
    adam.step()
    ema.update(model)
    main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    save(tmp_path, 1, accelerator.save_state, main=main, wait=wait)

    resumed, again, _, average = start()
    path = latest(tmp_path)
    verify(path)
    resumed.load_state(path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(average.state_dict(), ema.state_dict(), rtol=0, atol=0)


def test_a_file_is_replaced_whole_and_keeps_its_suffix(tmp_path):
    write_text(tmp_path / "new" / "run.yaml", "steps: 1\n")
    names = []

    def picture(path):
        names.append(path.suffix)
        path.write_bytes(b"png")

    write_file(tmp_path / "new" / "samples.png", picture)
    assert names == [".png"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["run.yaml", "samples.png"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "run.yaml", "old")

    def fail(path):
        path.write_text("ne")
        raise RuntimeError("no space\n at inline_container.cc")  # as torch.save has it

    with pytest.raises(
        OSError, match=r"run.yaml could not be written \(no space\); what was there is as it was"
    ):
        write_file(tmp_path / "run.yaml", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert (tmp_path / "run.yaml").read_text() == "old"


def test_a_folder_receives_all_files_or_none_and_keeps_other_files(tmp_path):
    folder = tmp_path / "model"

    def content():
        return {path.relative_to(tmp_path).as_posix(): path.read_text() for path in list_files(tmp_path)}

    write_text(folder / "notes.txt", "mine")
    write_folder(folder, lambda path: [write_text(path / name, "old") for name in ("a", "b/c")])
    before = content()
    assert before == {"model/notes.txt": "mine", "model/a": "old", "model/b/c": "old"}

    def fail(path):
        write_text(path / "a", "new")
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(OSError, match=r"model could not be written \(I/O error: No space left on device\)"):
        write_folder(folder, fail)
    assert content() == before
    write_folder(folder, lambda path: write_text(path / "a", "new"))
    assert content() == before | {"model/a": "new"}
