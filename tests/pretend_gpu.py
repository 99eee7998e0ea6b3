"""A GPU for machines that have none: tensors "on" it compute on the CPU, and what mixes both raises as CUDA would.

It finds tensors made on the wrong device, generators of the wrong device and arrays taken from a GPU. It says nothing
of CUDA's kernels, speed or precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda:0")
T = torch.Tensor
# These take tensors of two devices, or look at one alone.
_ACROSS = {"_has_compatible_shallow_copy_type", "copy_", "set_", "__get__", "__set__", "__deepcopy__", "type_as"}
_INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}  # whose indices may be on the CPU
_ON_CPU_ALONE = {"numpy", "__array__"}


class OnGPU(torch.Tensor):
    """A tensor in the CPU's memory that says it is on the GPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGPU:
        if id(self) not in memo:
            memo[id(self)] = moved = _on_gpu(self.detach().clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                moved._is_param = True  # type: ignore[attr-defined]
        copied: OnGPU = memo[id(self)]
        return copied


_REAL = torch.Generator


class _OnGPU(_REAL):
    """A generator that says it is on the GPU."""

    device = GPU  # type: ignore[assignment]


class _Kind(type):
    def __call__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return _OnGPU() if torch.device(device).type == "cuda" else _REAL()

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _REAL)


class _Generator(metaclass=_Kind):
    """In place of torch.Generator: makes one of the device that is asked for."""


def _on_gpu(tensor: T, requires_grad: bool = False) -> OnGPU:
    with torch._C.DisableTorchFunctionSubclass():
        made: OnGPU = T._make_subclass(OnGPU, tensor.detach(), requires_grad)  # type: ignore[attr-defined]
        return made


def _marked(result: Any) -> Any:
    """The tensors of a result, on the GPU."""

    def mark(tensor: T) -> T:
        if isinstance(tensor, OnGPU):
            return tensor
        return tensor.as_subclass(OnGPU)

    return tree_map_only(T, mark, result)


class PretendGPU(TorchFunctionMode):
    """Inside, the device "cuda" is one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")  # of a property: `device`, `grad`
        if owner == "device":
            return GPU if isinstance(args[0], OnGPU) else torch.device("cpu")
        if owner == "is_cuda":
            return isinstance(args[0], OnGPU)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], T):
            return self._moved(name, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, T)]
        on_gpu = any(isinstance(t, OnGPU) for t in tensors)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = "cpu"
        here = torch.device(asked).type == "cuda" if asked is not None else on_gpu
        self._check(name, args, tensors, leaves, here, asked is not None)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not here or not any(isinstance(leaf, T) for leaf in tree_leaves(result)):
            return result  # as a shape, which a map would make a plain tuple
        if asked is not None and isinstance(result, T) and result.is_leaf:
            return _on_gpu(result, result.requires_grad)
        if args and result is args[0]:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return _marked(result)

    def _check(
        self, name: str, args: tuple[Any, ...], tensors: list[T], leaves: list[Any], here: bool, made: bool
    ) -> None:
        if here and name in _ON_CPU_ALONE:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name in _INDEXED and isinstance(args[0], OnGPU):
            tensors = [t for t in tensors if t.dtype.is_floating_point or t.dtype == torch.uint8]
        if not made and name not in _ACROSS and here:
            strangers = [t for t in tensors if not isinstance(t, OnGPU) and t.dim()]
            if strangers:
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu: "
                    f"{[tuple(t.shape) for t in strangers]}"
                )
        for stream in (leaf for leaf in leaves if isinstance(leaf, _REAL)):
            if isinstance(stream, _OnGPU) != here:
                raise RuntimeError(f"{name}: Expected a '{'cuda' if here else 'cpu'}' device type for generator")

    def _moved(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, rest = args[0], list(args[1:])
        to_gpu = isinstance(tensor, OnGPU) if name == "to" else name == "cuda"
        if name != "to":
            rest, kwargs = [], {}
        for key, value in [*enumerate(rest), *kwargs.items()]:
            if isinstance(value, (str, torch.device)) or key == "device":
                to_gpu = to_gpu if value is None else torch.device(value).type == "cuda"
                (rest if isinstance(key, int) else kwargs)[key] = None if value is None else torch.device("cpu")
            elif isinstance(value, T):
                to_gpu = isinstance(value, OnGPU)
        with torch._C.DisableTorchFunctionSubclass():
            moved = T.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
            if to_gpu == isinstance(tensor, OnGPU):
                return moved if moved is tensor or not to_gpu else _marked(moved)
            if moved is tensor:
                moved = tensor.clone()  # another memory, as on a real GPU
            return moved.as_subclass(OnGPU if to_gpu else T)


_MODULE_TO = torch.nn.Module.to


def _to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Module.to, which asks a tensor for its device where no mode sees it."""
    args = tuple(part for arg in args for part in ((arg.device, arg.dtype) if isinstance(arg, T) else (arg,)))
    return _MODULE_TO(module, *args, **kwargs)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside the block `--device cuda` is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.nn.Module, "to", _to)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "manual_seed", lambda *_: None)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else a parameter stays where it was
        try:
            with PretendGPU():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
