"""train/adversarial.py with a step whose numbers are none, or whose updates are left out.

python leaving_out.py poisoned|idle STEP FLAGS...
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "train")]


def poisoned(before, step):
    """Batches as they are, and in one step one of the last process with a number that is none."""

    def batch(self, turn):
        drawn, process = before(self, turn), self.accelerator
        if turn == step and process.process_index == process.num_processes - 1:
            drawn.real[0, 0, 0] = float("nan")
        return drawn

    return batch


def idle(before, step):
    """Steps as they are, but for one in which no optimiser does anything."""

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


PATCHES = {"poisoned": ("batch", poisoned), "idle": ("step", idle)}

if __name__ == "__main__":
    import adversarial

    from rope_mm.training.config import run

    name, patch = PATCHES[sys.argv[1]]
    setattr(adversarial.Training, name, patch(getattr(adversarial.Training, name), int(sys.argv[2])))
    run(adversarial.main, adversarial.Adversarial, sys.argv[3:])
