"""Every script that writes results to a folder refuses one to which another command writes."""

import runpy
import sys
from pathlib import Path

import pytest

from rope_mm.training.folder_lock import locked

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "compare_factors": "factors/quick.yaml",
    "compare_heads": "heads/digits.yaml",
    "compare_losses": "adversarial/stacked-digits.yaml",
    "compare_schemes": "compare/small.yaml",
    "gaussians": "adversarial/gaussians.yaml",
    "lifelong": "lifelong/sprites.yaml",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_folder_that_another_command_writes_to_is_refused(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    config = ROOT / "configs" / COMMANDS[script]
    monkeypatch.setattr(sys, "argv", [script, "--config", str(config), "--output_dir", str(out)])
    monkeypatch.syspath_prepend(ROOT / "train")
    with locked(out):
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / "train" / f"{script}.py"), run_name="__main__")
        assert f"error: {out} is in use by process " in capsys.readouterr().err
    assert not out.exists(), "nothing was written, so nothing is left"
