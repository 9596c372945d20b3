"""train/pretrain.py whose workers are busy with the fifth batch for an hour, and which ends in step 3.

python busy_workers.py stopped|failed FLAGS...
"""

import os
import signal
import sys
import time

import pretrain

from rope_mm.training.config import run
from rope_mm.training.packed_dataset import PackedDocumentDataset


def stopped():
    os.kill(os.getpid(), signal.SIGTERM)


def failed():
    raise ValueError("the main process fails")


read, step = PackedDocumentDataset.__getitem__, pretrain.Training.step


def slow_read(self, number):
    if number == 4:
        time.sleep(3600)
    return read(self, number)


def last_step(self, number):
    if number == 2:
        globals()[sys.argv[1]]()
    return step(self, number)


if __name__ == "__main__":
    PackedDocumentDataset.__getitem__, pretrain.Training.step = slow_read, last_step
    run(pretrain.main, pretrain.Pretrain, sys.argv[2:])
