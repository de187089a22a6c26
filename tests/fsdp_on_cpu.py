"""`squat` for `accelerate launch --use_fsdp` on CPUs: accelerate itself shards on accelerators only.

Everything else is accelerate's and transformers' own path; what is tested with it is that a quantized model
can be sharded, trained, and put together again.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from squat.cli import main

_init = AcceleratorState.__init__


def _init_and_shard(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState().distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = _init_and_shard
main()
