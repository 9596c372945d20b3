"""train/pretrain.py whose workers are at the fifth turn for an hour, and which ends in step 3.

python busy_workers.py asked|failed FLAGS...
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))
import pretrain

from rope_mm.training.config import run
from rope_mm.training.dataset import PackedDocumentDataset


def asked():
    os.kill(os.getpid(), signal.SIGTERM)


def failed():
    raise ValueError("the main process fails")


read, step = PackedDocumentDataset.__getitem__, pretrain.Training.step


def slowly(self, turn):
    if turn == 4:
        time.sleep(3600)
    return read(self, turn)


def ending(self, number):
    if number == 2:
        globals()[sys.argv[1]]()
    return step(self, number)


if __name__ == "__main__":
    PackedDocumentDataset.__getitem__, pretrain.Training.step = slowly, ending
    run(pretrain.main, pretrain.Pretrain, sys.argv[2:])
