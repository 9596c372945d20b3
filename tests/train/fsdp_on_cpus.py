"""train/pretrain.py under accelerate's FSDP2 on CPUs, which accelerate itself has on accelerators only."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **how):
    start(self, *args, fsdp_plugin=fsdp_plugin, **how)
    if fsdp_plugin is None:  # a later look at the one state of the process
        return
    self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = sharded

import pretrain  # noqa: E402

from rope_mm.training.config import run  # noqa: E402

if __name__ == "__main__":
    run(pretrain.main, pretrain.Pretrain)
