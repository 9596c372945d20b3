"""The page that a training script leaves in its folder."""

import re
import shutil
import sys

import pytest


def without_history(page):
    """A page without the times and versions of its commands."""
    return re.sub(r"<h2>History</h2>.*?</table>", "", page, flags=re.DOTALL)


def test_a_resumed_run_has_the_page_of_an_uninterrupted_one_with_all_samples(adversarial, tmp_path):
    whole, parts = tmp_path / "whole" / "digits", tmp_path / "parts" / "digits"
    adversarial.train(whole, page=True, sample_every=2)
    page = (whole / "index.html").read_text()
    assert "images, steps 2 to 6" in page and page.count("<svg") == 1
    shutil.copytree(whole, parts)  # killed after the evaluation of step 6, before its checkpoint
    shutil.rmtree(parts / "checkpoints" / "step-000006")
    for name in ("result.json", "index.html"):
        (parts / name).unlink()
    shutil.rmtree(parts / "model")
    adversarial.train(parts, page=True, sample_every=2)
    assert without_history((parts / "index.html").read_text()) == without_history(page)


def test_a_run_that_is_stopped_between_evaluations_has_the_page_of_the_last_one(
    adversarial, tmp_path, monkeypatch
):
    step = adversarial.module.Training.step

    def fail(training, number):
        if number == 4:
            raise RuntimeError("the power is cut")
        return step(training, number)

    monkeypatch.setattr(adversarial.module.Training, "step", fail)
    with pytest.raises(RuntimeError, match="the power is cut"):
        adversarial.train(tmp_path / "run", page=True, sample_every=2)
    page = (tmp_path / "run" / "index.html").read_text()
    assert "images, steps 2 to 4" in page and "not finished: the log ends at step 4" in page


def test_the_page_has_every_command_with_its_steps_and_versions_and_links_to_the_weights(
    adversarial, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.setattr(
        sys, "orig_argv", ["/usr/bin/python", "train/adversarial.py", "--data.path", "my photos"]
    )
    adversarial.train(run, page=True, steps=2)
    adversarial.train(run, page=True, steps=2)  # is done
    adversarial.train(run, page=True, steps=4, extend=True)
    page = (run / "index.html").read_text()
    history = re.search(r"<h2>History</h2>(.*?)</table>", page, flags=re.DOTALL)[1]
    events = re.findall(r"<td>[-\d: ]{19}</td><td>(\d+)</td><td>(.*?)</td>", history)
    extended = "extended from 2 to 4 steps; from here rates are those of 4 steps"
    assert events == [("0", "begun, to step 2"), ("2", "finished"), ("2", extended), ("4", "finished")]
    assert (
        history.count("torch 2") == 1
        and history.count("python train/adversarial.py --data.path &#x27;my photos&#x27;") == 2
    )
    assert '<a href="model/model.safetensors">model/model.safetensors</a>, 0.' in page
    assert "nothing was evaluated: images need data.label" in page
    assert page.count("data:image/png") == 1  # the sheet of data


def test_no_page_is_written_where_none_is_asked_for_and_restart_removes_the_old_one(
    adversarial, tmp_path, capsys
):
    adversarial.train(tmp_path / "run", page=True, steps=2)
    assert f"page: {tmp_path}/run/index.html" in capsys.readouterr().out
    adversarial.train(tmp_path / "run", page=False, steps=2, restart=True)
    assert not (tmp_path / "run" / "index.html").exists()
    assert "page: " not in capsys.readouterr().out


def test_a_page_of_somebody_else_is_not_overwritten(adversarial, tmp_path):
    (tmp_path / "index.html").write_text("my own")
    with pytest.raises(ValueError, match=r"holds index\.html, but no run\.yaml"):
        adversarial.train(tmp_path, page=True)
    assert (tmp_path / "index.html").read_text() == "my own"
