"""train/adversarial.py with one step whose numbers are not finite, or whose updates are skipped.

python skipping.py STEP FLAGS...
"""

import sys

import adversarial

from rope_mm.training.config import run


def poisoned(before, step):
    """micro_batch, which in one step gives the last process a number that is not finite."""

    def micro_batch(self, update, part=0):
        batch, process = before(self, update, part), self.accelerator
        if update == step and process.process_index == process.num_processes - 1:
            batch.real[0, 0, 0] = float("nan")
        return batch

    return micro_batch


def idle(before, step):
    """step, in one of which no optimizer changes anything."""

    def take(self, number):
        if number != step:
            return before(self, number)
        optimizers = [wrapped.optimizer for wrapped in self.accelerator._optimizers]
        for optimizer in optimizers:
            optimizer.step = lambda *args, **kwargs: None
        try:
            return before(self, number)
        finally:
            for optimizer in optimizers:
                del optimizer.step

    return take


if __name__ == "__main__":
    training = adversarial.Training
    training.micro_batch = poisoned(training.micro_batch, int(sys.argv[1]))
    run(adversarial.main, adversarial.Adversarial, sys.argv[2:])
