"""Data parallel training over a model whose parameters change at the stage boundary."""

from __future__ import annotations

import gc

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def lay_out_anew(model: nn.Module) -> None:
    """Lay out the buckets of every DistributedDataParallel around `model`, in place, for the parameters there are now.

    Whoever holds the wrapper goes on with it: a Trainer's loop has it in a local variable.
    """
    wrappers = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
    for old in wrappers:
        if any(module is model for module in old.module.modules()):
            old.__dict__ = _wrapped_anew(old).__dict__


def _wrapped_anew(old: DistributedDataParallel) -> DistributedDataParallel:
    return DistributedDataParallel(
        old.module,
        device_ids=old.device_ids,
        output_device=old.output_device,
        broadcast_buffers=old.broadcast_buffers,
        process_group=old.process_group,
        bucket_cap_mb=None if old.bucket_bytes_cap_default else old.bucket_bytes_cap // 2**20,
        find_unused_parameters=old.find_unused_parameters,
        gradient_as_bucket_view=old.gradient_as_bucket_view,
        static_graph=old.static_graph,
    )
