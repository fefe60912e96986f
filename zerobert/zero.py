"""Where a model parameter lives inside a ZeRO shard.

ZeRO stages 1 and 2 (and DeepSpeed's BF16_Optimizer) lay the parameters of a group one after
another into a flat buffer, cut it into equal shards, and hand each rank's optimizer one 1-D fp32
tensor that knows nothing of the parameters inside. Stage 3 cuts each parameter, and lays a rank's
parts of a sub-group one after another. An optimizer that needs to know the parameters (LAMB's
trust ratio is per parameter) finds them here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of parameter number `index` that lies at `start` in a flat shard.

    Attributes:
        offset: the place of its first value in the whole parameter, flattened.
    """

    index: int
    start: int
    length: int
    offset: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What one rank holds of a parameter group.

    Attributes:
        segments: for each tensor of the optimizer's group, the parameters inside it.
        owners: the parameter number of each segment, int64 [segments], on the shard's device.
        num_parameters: parameters in the group, those on other ranks included.
        process_group: the ranks that together hold the group; None where each holds all of it.
    """

    segments: tuple[tuple[Segment, ...], ...]
    owners: Tensor
    num_parameters: int
    process_group: dist.ProcessGroup | None

    @property
    def is_shared(self) -> bool:
        """Whether a parameter may lie on several ranks."""
        return self.process_group is not None and dist.get_world_size(self.process_group) > 1


def locate(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Layout:
    """Find a group's model parameters inside the tensors that its optimizer steps.

    Args:
        parameters: the model's own parameters, as the group was built from.
        tensors: the group's tensors now: the same parameters, whole or as copies, or ZeRO's flat
            shard of them, or of a part of them (a sub-group of stage 3).
    """
    if hasattr(parameters[0], "_z3_optimizer"):
        return _stage_3(parameters[0]._z3_optimizer, tensors)
    if hasattr(parameters[0], "_dp_group"):
        return _stages_1_and_2(parameters, tensors)
    whole = [
        (Segment(index=i, start=0, length=tensor.numel()),) for i, tensor in enumerate(tensors)
    ]
    return _layout(tensors, whole, len(tensors), None)


def _stages_1_and_2(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Layout:
    (shard,) = tensors
    process_group: dist.ProcessGroup = parameters[0]._dp_group  # type: ignore[attr-defined]
    first = dist.get_rank(process_group) * shard.numel()
    segments = []
    for index, parameter in enumerate(parameters):
        # A parameter is a view of the group's flat buffer: its storage offset is its place there.
        # (DeepSpeed's own table of addresses is wrong under round_robin_gradients.)
        offset = int(parameter.storage_offset())
        start, end = max(offset, first), min(offset + parameter.numel(), first + shard.numel())
        if start < end:
            segments.append(
                Segment(index=index, start=start - first, length=end - start, offset=start - offset)
            )
    return _layout(tensors, [tuple(segments)], len(parameters), process_group)


def _stage_3(optimizer: Any, tensors: Sequence[Tensor]) -> Layout:
    """Every parameter is cut on its own, into parts of one length; the last may end in padding,
    which is memory that nobody has written.
    """
    (shard,) = tensors
    (number,) = (
        i for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat) if flat is shard
    )
    process_group: dist.ProcessGroup = optimizer.sub_group_process_groups[number]
    rank = dist.get_rank(process_group)
    segments, start = [], 0
    for index, parameter in enumerate(optimizer.fp16_groups[number]):
        share = parameter.partition_numel()
        length = min(share, parameter.ds_numel - rank * share)
        if length > 0:
            segments.append(Segment(index=index, start=start, length=length, offset=rank * share))
        start += share
    return _layout(tensors, [tuple(segments)], len(optimizer.fp16_groups[number]), process_group)


def _layout(
    tensors: Sequence[Tensor],
    segments: Sequence[tuple[Segment, ...]],
    num_parameters: int,
    process_group: dist.ProcessGroup | None,
) -> Layout:
    owners = [segment.index for of_tensor in segments for segment in of_tensor]
    return Layout(
        segments=tuple(segments),
        owners=torch.tensor(owners, dtype=torch.int64, device=tensors[0].device),
        num_parameters=num_parameters,
        process_group=process_group,
    )


def sum_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Add up a tensor over the ranks that share a group, in place.

    An optimizer that is offloaded to the CPU has its norms there, where nccl can't add them up.
    """
    if values.device.type == "cpu" and dist.get_backend(process_group) == "nccl":
        on_device = values.cuda()
        dist.all_reduce(on_device, group=process_group)
        values.copy_(on_device)
    else:
        dist.all_reduce(values, group=process_group)


def views(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The segments of a group's tensors, each as a 1-D view."""
    return [
        tensor.view(-1)[segment.start : segment.start + segment.length]
        for tensor, segments in zip(tensors, layout.segments, strict=True)
        for segment in segments
    ]
