"`mdl_train` with real FSDP on CPUs. torch can, but accelerate turns it on for accelerators only; here it is turned on for gloo as well"
import os

from accelerate.state import AcceleratorState, DistributedType, PartialState

original = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp

if __name__ == "__main__":
    from mdl_nbdev.cli.commands import mdl_train
    mdl_train()
