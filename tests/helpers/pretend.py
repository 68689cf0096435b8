"""A pretend accelerator: its tensors say that they are on `cuda:0`, and their values are on the CPU.

It refuses what a GPU refuses, and it records what a GPU hides. Found are: operators that mix host and device, copies
from memory that cannot be pinned, pinned memory that is changed or read while a copy is under way, work on one stream
that does not wait for another, and every place where the host waits for the device.

To autograd and to torch's C++ it is a device of its own (`PrivateUse1`, registered from Python), so that backward runs
in the thread that autograd keeps for a device. To Python it is CUDA: functions of torch that take a device are patched,
and `torch.cuda` has one card. `torch.compile`, kernels, NCCL, true memory and speed remain for a real device.

torch cannot forget the registration: use it in a process of its own (`tests/accelerator/on_pretend.py`).
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from threading import RLock, local
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._device
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

import vft

aten = torch.ops.aten
CLAIMED = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
"""The device as Python sees it."""
INNER = torch.device("privateuseone", 0)
"""The device as torch's C++ sees it."""
GIB = 1 << 30
PACKAGE = Path(vft.__file__).parent

COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
NEEDS_VALUES = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.repeat_interleave),
    *(aten.unique_consecutive, aten.unique_dim, aten._unique2, aten.bincount),
}
"""Operators whose result, or its size, the host has to know."""
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "empty_strided", "rand", "randn", "randint", "randperm"),
    *("arange", "linspace", "eye", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
RESIZING = ("arange", "linspace", "randperm", "eye")
"""Factories that resize an empty tensor, which a wrapper cannot follow: they run on the CPU."""
METHODS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


class HostWaits(RuntimeError):
    """The host waits for the device where it must not."""


class Race(RuntimeError):
    """Memory is used before a copy, or the work of another stream, is complete."""


class DeviceTensor(Tensor):
    """A tensor on the pretend device. `values` is the CPU tensor behind it."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CLAIMED)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = Tensor._make_wrapper_subclass(cls, values.shape, device=INNER, **layout)
        made.values = values
        Device.current.allocated(values)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.current.run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy  # type: ignore[assignment]

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        """Its memory is not reused before the work that `stream` has now is done."""
        Device.current.users(self.values)[stream.number] = True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"


# ------------------------------------------------------------------------------------------------------------- streams


class Stream:
    """Work in order. `seen` says up to which operation of each other stream it has waited for."""

    numbers = 0
    device = CLAIMED

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number, Stream.numbers = Stream.numbers, Stream.numbers + 1
        self.seen: Counter[int] = Counter()

    def wait_stream(self, other: Stream) -> None:
        """Later work here comes after what `other` has now. The host does not wait."""
        self.seen |= other.seen

    def wait_event(self, event: Event) -> None:
        """Later work here comes after the event."""
        self.seen |= event.seen

    def record_event(self, event: Event | None = None) -> Event:
        """An event at the end of the work so far."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits for the stream."""
        Device.current.wait("synchronize a stream", self.seen)

    def query(self) -> bool:
        """Whether the work is done: not before somebody has waited."""
        return not any(self.seen[one.stream] >= one.operation for one in Device.current.under_way)

    def __enter__(self) -> Stream:
        self.outer, Device.current.threads.stream = Device.current.stream, self
        return self

    def __exit__(self, *_: Any) -> None:
        Device.current.threads.stream = self.outer


class Event:
    """A point in a stream's work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: Counter[int] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        """The end of the stream's work so far."""
        self.seen = Counter((stream or Device.current.stream).seen)

    def wait(self, stream: Stream | None = None) -> None:
        """Later work of the stream comes after the event."""
        (stream or Device.current.stream).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for the event."""
        Device.current.wait("synchronize an event", self.seen)

    def query(self) -> bool:
        """Whether it has been reached."""
        return not any(self.seen[one.stream] >= one.operation for one in Device.current.under_way)

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds to another event: here always the same."""
        return 1.0


# ---------------------------------------------------------------------------------------------------------- the device


@dataclass(eq=False)
class Transfer:
    """A copy that is under way."""

    memory: Tensor
    """The host's side of it."""
    values: Tensor
    """What is copied."""
    to_host: bool
    stream: int
    operation: int


@dataclass
class Device:
    """What the device knows while it is there."""

    current: Any = field(default=None, init=False, repr=False)
    total_bytes: int = 80 * GIB
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the host waited: place in vft (`training.trainer:Trainer.train_step`), and for what."""
    allowed: tuple[str, ...] | None = None
    """Within `no_waits`: places that may wait."""
    under_way: list[Transfer] = field(default_factory=list)
    bytes: int = 0
    """Of all tensors on the device."""
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.pinned = WeakIdKeyDictionary()
        self.written = WeakIdKeyDictionary()  # storage -> (stream, operation) of its last write
        self.used_by = WeakIdKeyDictionary()  # storage -> {stream: whether record_stream was called}
        self.known = WeakIdKeyDictionary()
        self.threads = local()
        self.default = Stream()
        self.lock = RLock()  # backward runs in autograd's thread for the device

    @property
    def stream(self) -> Stream:
        """The stream of this thread."""
        return getattr(self.threads, "stream", self.default)

    def allocated(self, values: Tensor) -> None:
        """Count the memory of a tensor until nothing uses it."""
        storage = values.untyped_storage()
        with self.lock:
            if storage not in self.known:
                size = storage.nbytes()
                self.known[storage] = size
                self.bytes += size
                self.peak_bytes = max(self.peak_bytes, self.bytes)
                weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size

    def users(self, values: Tensor) -> dict[int, bool]:
        """Streams that used a tensor's memory."""
        storage = values.untyped_storage()
        if storage not in self.used_by:
            self.used_by[storage] = {}
        return self.used_by[storage]

    def note(self, tensors: list[DeviceTensor], results: list[DeviceTensor]) -> None:
        """An operation of this thread's stream: what it reads must be complete by then."""
        with self.lock:
            stream = self.stream
            stream.seen[stream.number] += 1
            for one in tensors:
                by, at = self.written.get(one.values.untyped_storage(), (stream.number, 0))
                if by != stream.number and stream.seen[by] < at:
                    raise Race(f"{place()}: stream {stream.number} uses a tensor that stream {by} has not written yet")
            for one in results:
                self.written[one.values.untyped_storage()] = (stream.number, stream.seen[stream.number])

    # ------------------------------------------------------------------------------------------------------ operators

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """An operator of which an argument is on the device."""
        leaves = tree_leaves((args, kwargs))
        on_device = [x for x in leaves if isinstance(x, DeviceTensor)]
        on_host = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        if func in COPIES and (on_host or to_host):
            return self.copy(func, args, kwargs)
        if any(x.dim() or func in INDEXING for x in on_host):  # a number in a tensor is taken along
            shapes = [tuple(x.shape) for x in on_host]
            raise RuntimeError(f"{place()}: {func} expects all tensors on cuda:0, but {shapes} are on the host")
        by_mask = func in INDEXING and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
        )
        size_known = func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is not None
        if by_mask or (func.overloadpacket in NEEDS_VALUES and not size_known):
            self.wait(f"{func.overloadpacket.__name__}{' by a mask' if by_mask else ''}")
        if target is not None:
            kwargs = {**kwargs, "device": "cpu"}
        values, options = tree_map_only(DeviceTensor, lambda x: x.values, (args, kwargs))
        result = func(*values, **options)
        assert all(x.shape == x.values.shape for x in on_device), f"{func} changes a shape in place: not pretended"
        same = {id(x.values): x for x in on_device}  # of an operator in place
        if not to_host:
            result = tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else DeviceTensor(x), result)
        self.note(on_device, [x for x in tree_leaves(result) if isinstance(x, DeviceTensor)])
        return result

    def copy(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Between host and device. It goes on beside the host only if it may (`non_blocking`) and memory is pinned."""
        if func is aten._to_copy.default:
            source, beside = args[0], bool(kwargs.get("non_blocking", False))
            target = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if beside and isinstance(source, DeviceTensor):
                self.pinned[target.untyped_storage()] = True  # torch's own choice for such a copy
            elif not isinstance(source, DeviceTensor):
                target = DeviceTensor(target)
        else:
            target, source = args[:2]
            beside = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        to_host = not isinstance(target, DeviceTensor)
        memory = target if to_host else source
        is_pinned = memory.untyped_storage() in self.pinned
        if memory.numel() and not (beside and is_pinned):
            self.wait(
                f"copy {'to' if to_host else 'from'} {'pinned' if is_pinned else 'pageable'} memory", self.stream.seen
            )
        self.note([source] if to_host else [], [] if to_host else [target])
        with self.lock:
            at = self.stream.number, self.stream.seen[self.stream.number]
            if to_host and beside and is_pinned:
                self.under_way.append(Transfer(target, source.values.to(target.dtype, copy=True), True, *at))
                target.reshape(-1).view(torch.uint8).fill_(255)  # NaN, until it has arrived
            elif to_host:
                target.copy_(source.values)
            else:
                target.values.copy_(source)
                if beside and is_pinned:
                    self.under_way.append(Transfer(source, source.detach().clone(), False, *at))
        return target

    # --------------------------------------------------------------------------------------------------------- waiting

    def wait(self, why: str, seen: Counter[int] | None = None) -> None:
        """The host waits, and copies arrive: all of them, or those before the points of streams in `seen`."""
        with self.lock:
            where = place()
            self.waits[where, why] += 1
            if self.allowed is not None and not any(where.endswith(name) for name in self.allowed):
                raise HostWaits(f"{where}: the host waits for the device ({why})")
            for one in list(self.under_way):
                if seen is None or seen[one.stream] >= one.operation:
                    self.under_way.remove(one)
                    self.arrive(one)

    def arrive(self, one: Transfer) -> None:
        """End a copy. The host's memory must not have changed since it began."""
        if one.to_host:
            one.memory.copy_(one.values)
        elif not _same_bytes(one.memory, one.values):
            raise Race("pinned memory was changed before its copy to the device was complete")

    @contextmanager
    def no_waits(self, *allowed: str) -> Iterator[None]:
        """Within it a wait is an error, except in functions of vft that are named (`Trainer.train_step`)."""
        self.allowed = allowed
        try:
            yield
        finally:
            self.allowed = None

    def pin(self, tensor: Tensor) -> Tensor:
        """Memory of the same strides, and a copy into it, as torch does it."""
        if isinstance(tensor, DeviceTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        self.pinned[made.untyped_storage()] = True
        return made


def place() -> str:
    """The innermost function of vft in the stack (`models.decoder:Decoder.forward`), else of tests, else `torch`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}:{frame.f_code.co_qualname}"
        if "planted" in frame.f_code.co_qualname:
            return f"planted:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "torch"


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


# ------------------------------------------------------------------------------------------------------ torch, patched


class Backend(_DummyBackendModule):
    """`torch.pretend`. Random numbers are the host's."""

    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))
    manual_seed = manual_seed_all = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


@cache
def register() -> None:
    """Give torch the device, once in a process."""
    _setup_privateuseone_for_python_backend("pretend", Backend())
    library = torch.library.Library("aten", "IMPL")
    for name, make in (
        ("empty.memory_format", lambda size, dtype=None, **_: torch.empty(size, dtype=dtype)),
        ("empty_strided", lambda size, stride, dtype=None, **_: torch.empty_strided(size, stride, dtype=dtype)),
    ):
        library.impl(name, lambda *args, make=make, **kwargs: DeviceTensor(make(*args, **kwargs)), "PrivateUse1")

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Any:  # of torch.tensor(..., device=)
        return Device.current.copy(aten.copy_.default, (target, source, non_blocking), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # it must live as long as the process


def inner(value: Any) -> Any:
    """A device argument as torch is to see it."""
    if isinstance(value, torch.device):
        return INNER if value.type == "cuda" else value
    return INNER if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def translated(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's in which "cuda" is the pretend device. A function mode would not reach other threads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        pin = kwargs.pop("pin_memory", False)
        if name in RESIZING and inner(kwargs.get("device")) == INNER:
            return DeviceTensor(function(*args, **{**kwargs, "device": "cpu"}))
        result = function(*map(inner, args), **{key: inner(value) for key, value in kwargs.items()})
        if pin:
            Device.current.pinned[result.untyped_storage()] = True
        return result

    return call


class HostGenerator(torch.Generator):
    """A generator of a device is the host's."""

    def __new__(cls, device: Any = None) -> HostGenerator:
        return super().__new__(cls)


def cuda_of(device: Device) -> dict[str, Any]:
    """What `torch.cuda` says of the device."""

    def memory_stats(*_: Any) -> dict[str, int]:
        return {"allocated_bytes.all.current": device.bytes, "allocated_bytes.all.peak": device.peak_bytes}

    properties = SimpleNamespace(
        name="Pretend", total_memory=device.total_bytes, major=9, minor=0, multi_processor_count=1, gcnArchName=""
    )

    def reset_peak(*_: Any) -> None:
        device.peak_bytes = device.bytes

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: CLAIMED.index + 1,
        "current_device": lambda: CLAIMED.index,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (device.total_bytes - device.bytes, device.total_bytes),
        "memory_allocated": lambda *_: device.bytes,
        "max_memory_allocated": lambda *_: device.peak_bytes,
        "max_memory_reserved": lambda *_: device.peak_bytes,
        "memory_reserved": lambda *_: device.bytes,
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "synchronize": lambda *_: device.wait("synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: device.stream,
        "default_stream": lambda *_: device.default,
        "stream": lambda stream: stream,
    }


@contextmanager
def pretend_device(total_bytes: int = 80 * GIB) -> Iterator[Device]:
    """For as long as this lasts torch has one GPU, which is not there."""
    register()
    torch.utils._device._device_constructors()  # cached by torch: it must know its own functions, not ours
    device = Device(total_bytes=total_bytes)
    to_list, init_process_group = Tensor.tolist, torch.distributed.init_process_group

    def tolist(self: Tensor) -> Any:
        if isinstance(self, DeviceTensor):
            device.wait("tolist")
        return to_list(self.values if isinstance(self, DeviceTensor) else self)

    tensor_methods: dict[str, Any] = {
        "tolist": tolist,
        "pin_memory": lambda self, *_: device.pin(self),
        "is_pinned": lambda self, *_: self.untyped_storage() in device.pinned,
    }
    with ExitStack() as stack:
        replace = partial(patch.object, create=False)
        for name, value in cuda_of(device).items():
            stack.enter_context(replace(torch.cuda, name, value))
        for holder, names in ((torch, FACTORIES), (Tensor, METHODS)):
            for name in names:
                stack.enter_context(replace(holder, name, translated(name, getattr(holder, name))))
        for name, value in tensor_methods.items():
            stack.enter_context(replace(Tensor, name, value))
        gloo = lambda backend, **options: init_process_group("cpu:gloo,cuda:gloo", **options)  # noqa: E731
        stack.enter_context(replace(torch.distributed, "init_process_group", gloo))
        stack.enter_context(replace(torch, "Generator", HostGenerator))
        stack.enter_context(replace(Device, "current", device))
        yield device
