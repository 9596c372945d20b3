"""A run that ends while its workers are busy ends at once, and leaves none behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("stopped", 0), ("failed", 2)])
def test_a_run_ends_without_waiting_for_busy_workers_and_leaves_none_running(
    end, code, pretrain, runs, tmp_path
):
    script = str(Path(__file__).with_name("busy_workers.py"))
    words = [sys.executable, script, end, *pretrain.flags(tmp_path / "run", num_workers=2, steps=20)]
    process = subprocess.Popen(words, env=runs.environment(), start_new_session=True, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=90)  # most of it imports
        assert process.returncode == code, said.decode()[-2000:]
        assert b"Traceback" not in said
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
