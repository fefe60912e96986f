"""Where a model parameter lives inside a ZeRO shard.

ZeRO stages 1 and 2 (and DeepSpeed's BF16_Optimizer) lay the parameters of a group one after
another into a flat buffer, cut it into equal shards, and hand each rank's optimizer one 1-D fp32
tensor that knows nothing of the parameters inside. An optimizer that needs to know them (LAMB's
trust ratio is per parameter) finds them here.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zerobert.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of parameter number `index` that lies at `start` in a flat shard."""

    index: int
    start: int
    length: int


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


def locate(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Layout:
    """Find a group's model parameters inside the tensors that its optimizer steps.

    Args:
        parameters: the model's own parameters, as the group was built from.
        tensors: the group's tensors now: the same parameters, or ZeRO's flat shard of them.

    Raises:
        ConfigError: the parameters are sharded in a way that is not known here (ZeRO stage 3).
    """
    if hasattr(parameters[0], "_z3_optimizer"):
        raise ConfigError(
            "LAMB does not serve ZeRO stage 3 yet; set zero_optimization.stage to 0, 1 or 2"
        )
    if not hasattr(parameters[0], "_dp_group"):
        whole = [
            (Segment(index=i, start=0, length=tensor.numel()),) for i, tensor in enumerate(tensors)
        ]
        return _layout(tensors, whole, len(tensors), None)
    (shard,) = tensors
    process_group: dist.ProcessGroup = parameters[0]._dp_group
    first = dist.get_rank(process_group) * shard.numel()
    segments = []
    for index, parameter in enumerate(parameters):
        # A parameter is a view of the group's flat buffer: its storage offset is its place there.
        # (DeepSpeed's own table of addresses is wrong under round_robin_gradients.)
        offset = int(parameter.storage_offset())
        start, end = max(offset, first), min(offset + parameter.numel(), first + shard.numel())
        if start < end:
            segments.append(Segment(index=index, start=start - first, length=end - start))
    return _layout(tensors, [tuple(segments)], len(parameters), process_group)


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
    """Add up a tensor over the ranks that share a group, in place."""
    if process_group is not None and dist.get_world_size(process_group) > 1:
        dist.all_reduce(values, group=process_group)


def views(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The segments of a group's tensors, each as a 1-D view."""
    return [
        tensor.view(-1)[segment.start : segment.start + segment.length]
        for tensor, segments in zip(tensors, layout.segments, strict=True)
        for segment in segments
    ]


def squared_norms(pieces: Sequence[Tensor], layout: Layout) -> Tensor:
    """This rank's share of each parameter's squared 2-norm, fp32 [num_parameters]."""
    totals = torch.zeros(layout.num_parameters, dtype=torch.float32, device=layout.owners.device)
    if pieces:
        norms = torch.stack(torch._foreach_norm(list(pieces), dtype=torch.float32))
        totals.index_add_(0, layout.owners, norms.square())
    return totals
