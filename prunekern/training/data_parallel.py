"""Data parallel training over a model whose parameters change at the stage boundary."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel


def wrapped_anew(old: DistributedDataParallel) -> DistributedDataParallel:
    """The module of a wrapper in a new one like it, whose buckets are laid out for the parameters there are now."""
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
