"""W over the processes: each holds some of its rows, and the checkpoint holds one W."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# Classes drawn at a time where the initial weights are.
_BLOCK = 1 << 14


def device_of(
    process_group: dist.ProcessGroup | DeviceMesh | None, device: torch.device | str | int | None
) -> torch.device:
    """Where the module is to be. None: on torch's default device, or where the mesh is."""
    where = torch.empty(0, device=device).device
    if device is not None or where.type == "meta" or not isinstance(process_group, DeviceMesh):
        return where
    if where.type == process_group.device_type:
        return where
    return torch.empty(0, device=process_group.device_type).device


def mesh_of(
    process_group: dist.ProcessGroup | DeviceMesh | None, device: torch.device
) -> DeviceMesh:
    """The 1-D mesh of the processes that share the classes; None: of all.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: what is neither a group nor a mesh.
        ValueError: a mesh of several dimensions, of another type of device, or in another order
            than its group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group() "
            "first, or use lsoftmax.LSoftmaxLoss in a program of one process"
        )
    if not isinstance(process_group, DeviceMesh):
        group = dist.group.WORLD if process_group is None else process_group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group: expected a ProcessGroup, a DeviceMesh or None, got "
                f"{type(process_group).__name__}"
            )
        return DeviceMesh.from_group(group, device.type)
    if process_group.ndim != 1:
        raise ValueError(
            f"process_group: expected a DeviceMesh of 1 dimension (mesh[name]), got one of "
            f"{process_group.ndim}: {process_group}"
        )
    if process_group.device_type != device.type:
        raise ValueError(f"device: expected the mesh's, {process_group.device_type}, got {device}")
    order = process_group.mesh.tolist()
    ranks = dist.get_process_group_ranks(process_group.get_group())
    if order != ranks:  # rows are dealt out by the one and saved by the other
        raise ValueError(
            f"process_group: expected a DeviceMesh in the order of its group, {ranks}, got {order}"
        )
    return process_group


class ClassShard(nn.Module):
    """Rows of W (C, D): what ``nn.Linear(bias=False)`` is to the layer of one process.

    ``weight`` is a ``DTensor`` in ``Shard(0)``: of shape (C, D), with this process's rows in its
    memory. Optimizers keep their state alike, and ``torch.distributed.checkpoint`` saves and loads
    both on any number of processes. The rows are dealt out as ``torch.chunk`` does.

    Args:
        in_features: D.
        num_classes: C.
        mesh: 1-D.
        device, dtype: of the weight.

    Attributes:
        classes: the classes whose rows are here.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        mesh: DeviceMesh,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes, self.mesh = in_features, num_classes, mesh
        size = -(-num_classes // mesh.size())
        start = min(mesh.get_local_rank() * size, num_classes)
        self.classes = range(start, min(start + size, num_classes))
        local = torch.empty(len(self.classes), in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(self._whole(local))
        self.reset_parameters()

    def _whole(self, local: Tensor) -> DTensor:
        return DTensor.from_local(
            local,
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((self.num_classes, self.in_features)),
            stride=(self.in_features, 1),
        )

    def local(self) -> Tensor:
        """The rows that are here, a plain tensor; differentiable."""
        return cast(DTensor, self.weight).to_local()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``nn.Linear``'s initial weights. Each process draws all of W and keeps its rows, so that
        with one seed everywhere no two shards are alike, and on a CPU W is that of one process.
        """
        local = self.local()
        mine = self.classes
        for start in range(0, self.num_classes, _BLOCK):
            stop = min(start + _BLOCK, self.num_classes)
            block = local.new_empty(stop - start, self.in_features)
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
            first, last = max(start, mine.start), min(stop, mine.stop)
            if first < last:
                local[first - mine.start : last - mine.start] = block[first - start : last - start]

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"classes={self.classes.start}..{self.classes.stop}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts the whole W, a tensor, from the checkpoint of a layer of one process.

        Raises:
            ValueError: the rows are those of another process, or of another number of processes.
        """
        key = prefix + "weight"
        whole: Any = state_dict.get(key)
        if isinstance(whole, DTensor):
            theirs, mine = (_place(w.device_mesh) for w in (whole, cast(DTensor, self.weight)))
            if theirs != mine:
                raise ValueError(
                    f"{key}: expected the rows of process {mine}, got those of {theirs}. "
                    "torch.save has the rows of one process: use torch.distributed.checkpoint, or "
                    "save all with StateDictOptions(full_state_dict=True) (docs/distributed.md)"
                )
        elif isinstance(whole, Tensor) and whole.shape == self.weight.shape:
            rows = whole[self.classes.start : self.classes.stop]
            state_dict[key] = self._whole(rows.to(self.local()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _place(mesh: DeviceMesh) -> str:
    """Of the process that has (or had, when the mesh was saved) this mesh."""
    coordinate, shape = mesh.get_coordinate(), tuple(mesh.shape)
    if coordinate is None:
        return f"none of {math.prod(shape)}"
    if len(shape) == 1:
        return f"{coordinate[0]} of {shape[0]}"
    return f"{tuple(coordinate)} of {shape}"
