"""Two machines, as two launchers of one process each: with one file system, and with one for each."""

import shutil
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(rank, port):
    """The words that launch a process on a machine."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*words, "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port)]


def launch(script, folders, environment, launcher=torchrun, **changes):
    """The exit codes and error messages of the same relative command in one working directory per machine."""
    port, machines = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        command = [*launcher(rank, port), str(script.path), *script.flags("run", **changes)]
        env = environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        machines.append(subprocess.Popen(command, cwd=folder, env=env, **pipes))
    messages = [machine.communicate(timeout=240)[1] for machine in machines]
    return [machine.returncode for machine in machines], messages


def test_two_machines_that_share_the_folder_resume_and_train_as_one(
    adversarial, accelerate_command, runs, tmp_path
):
    def accelerate(rank, port):  # --multi_gpu: the only way it launches processes of several machines itself
        words = [accelerate_command, "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
        words += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--mixed_precision", "no"]
        return [*words, "--main_process_port", str(port), "--dynamo_backend", "no"]

    run, whole, settings = tmp_path / "run", tmp_path / "whole", {"steps": 4, "checkpoint_every": 2}
    adversarial.train(whole, **settings)
    shutil.copytree(whole, run)
    for made in ("checkpoints/step-000004", "model"):
        shutil.rmtree(run / made)
    codes, messages = launch(adversarial, [tmp_path] * 2, runs.environment, accelerate, **settings)
    assert codes == [0, 0], messages
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    for ours, theirs in zip(runs.lines(run), runs.lines(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def test_machines_that_do_not_share_the_folder_are_refused_before_anything_is_written(
    adversarial, runs, tmp_path
):
    folders = [tmp_path / "first", tmp_path / "second"]
    codes, messages = launch(adversarial, folders, runs.environment)
    assert all(code != 0 for code in codes)
    for text in messages:
        assert "process 1 does not see the folder" in text
        assert "give --output_dir a folder on a file system that all machines share" in text
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
