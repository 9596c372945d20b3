"""A run that ends while its workers are busy ends at once, and leaves none behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_pretrain import environment, flags


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("asked", 0), ("failed", 2)])
def test_busy_workers_hold_up_no_end_and_outlive_none(end, code, data, tmp_path):
    script = str(Path(__file__).with_name("busy_workers.py"))
    words = [sys.executable, script, end, *flags(data, tmp_path / "run", workers=2, steps=20)]
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE)
    try:
        _, told = process.communicate(timeout=90)  # of which most are imports
        assert process.returncode == code, told.decode()[-2000:]
        assert b"Traceback" not in told
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
