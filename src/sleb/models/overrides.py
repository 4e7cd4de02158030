"""Parameters of blocks, read and changed wherever they lie: on a device, in files or memory from
which accelerate's hooks fetch them, split over processes."""

from __future__ import annotations

from collections import ChainMap
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sleb.models.offload import fetcher
from sleb.models.stack import BlockStack


def whole(parameter: Tensor) -> Tensor:
    """A parameter in one piece. One that is split over processes is gathered: all have to ask."""
    gather = getattr(parameter, "full_tensor", None)
    if gather is None:
        return parameter.detach()
    with torch.inference_mode(False), torch.no_grad():  # such a mode it cannot do with
        gathered: Tensor = gather().detach()
    return gathered


def full_input(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear module takes, of which a process may be given its part alone; all have to ask.
    x [..., in or less] -> [..., in]."""
    weight: Any = module.weight
    if not hasattr(weight, "device_mesh") or x.shape[-1] == weight.shape[-1]:
        return x
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*x.shape[:-1], weight.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    places = [Shard(x.dim() - 1)]
    split = DTensor.from_local(x, weight.device_mesh, places, shape=shape, stride=stride)
    return split.full_tensor()


class WeightOverrides:
    """Blocks' parameters with other values, until :meth:`undo`; then each is as it was, to the bit.

    ``values``: the new ones by block and path in it, whole, on the CPU, in the model's dtype, in
    the order in which they were first put. What lies in files stays as it is there: new values lie
    over it, where all see them that fetch the block. Of two on one stack the later is undone first.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack
        self.values: dict[tuple[int, str], Tensor] = {}
        self._places: dict[tuple[int, str], _Place] = {}

    def __len__(self) -> int:
        return len(self.values)

    def put(self, i: int, path: str, value: Tensor) -> None:
        """Give a parameter of block ``i`` the values of a whole one."""
        block, key = self.stack.blocks[i], (i, path)
        parameter = block.get_parameter(path)
        with torch.inference_mode(False), torch.no_grad():  # it outlives any such mode
            form = torch.contiguous_format
            value = value.to("cpu", parameter.dtype, copy=True, memory_format=form)
            if key not in self._places:
                fetched = fetcher(block, path)
                self._places[key] = _Fetched(*fetched) if fetched else _Held(parameter)
            self.values[key] = value
            self._places[key].write(value)
        self.stack.reader.forget(i)

    def undo(self, keep: int = 0) -> None:
        """Undo all changes but the first ``keep``, the latest first."""
        while len(self.values) > keep:
            key, _ = self.values.popitem()
            with torch.no_grad():
                self._places.pop(key).undo()
            self.stack.reader.forget(key[0])


class _Place(Protocol):
    """Where the values of one parameter are changed."""

    def write(self, value: Tensor) -> None: ...

    def undo(self) -> None: ...


class _Held:
    """A parameter in memory, or this process's part of one."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.split = parameter, hasattr(parameter, "device_mesh")
        self.own: Tensor = parameter.to_local() if self.split else parameter.detach()
        self.before = self.own.clone()

    def write(self, value: Tensor) -> None:
        if self.split:
            from torch.distributed.tensor import distribute_tensor

            mesh, places = self.parameter.device_mesh, self.parameter.placements
            value = value.to(self.own.device)
            part: Any = distribute_tensor(value, mesh, places, src_data_rank=None)
            value = part.to_local()
        self.own.copy_(value)

    def undo(self) -> None:
        self.own.copy_(self.before)


class _Fetched:
    """A parameter that a hook fetches when its module runs. It may be in place just now."""

    def __init__(self, module: nn.Module, hook: Any, name: str) -> None:
        self.module, self.hook, self.name = module, hook, name
        self.over: dict[str, Tensor] = {}
        hook.weights_map = ChainMap(self.over, hook.weights_map)

    def write(self, value: Tensor) -> None:
        self.over[self.name] = value
        self._show(value)

    def undo(self) -> None:
        self.hook.weights_map = self.hook.weights_map.maps[1]
        self._show(self.hook.weights_map[self.name])

    def _show(self, value: Tensor) -> None:
        """Put other memory in place of a parameter's: its own may be a file, or what is fetched."""
        from accelerate.utils import set_module_tensor_to_device  # type: ignore[import-untyped]

        device = self.module.get_parameter(self.name).device
        if device.type != "meta":
            set_module_tensor_to_device(self.module, self.name, device, value=value)
