"""torch.cuda on the pretend devices: the current device and stream of each thread, events, memory.

install() puts it in the place of torch.cuda's functions. The library of shim.py must be loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from tests.pretend_cuda import recorder as rec
from tests.pretend_cuda.recorder import Actor, Clock, Recorder

RECORDER = Recorder()
NUM_DEVICES = 8
MEMORY_BYTES = 140 << 30  # of a device

_library: ctypes.CDLL | None = None
_home = 0  # the device of this process; work on another is a fault
_numbers = itertools.count(1)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}


_per_thread = _PerThread()
_default_streams: dict[int, Stream] = {}


def current_device() -> int:
    assert _library is not None
    return _library.pretend_current_device()


def set_device(device: Any) -> None:
    """As cudaSetDevice, which opens a context on the device since CUDA 12."""
    assert _library is not None
    index = _index(device)
    touch(index)
    _library.pretend_set_device(index)


def _index(device: Any) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index


def touch(index: int) -> None:
    """Something is done on a device: it opens a context there."""
    if index != _home:
        RECORDER.note(rec.FOREIGN, f"cuda:{index} is used by the process of cuda:{_home}")


def launch(index: int, is_kernel: bool = True) -> Actor:
    """The stream that work on a device is given to by this thread. An allocation is no kernel."""
    touch(index)
    actor = current_stream(index).actor
    RECORDER.launched += RECORDER.is_on and is_kernel
    RECORDER.launch(actor)
    return actor


def synchronised(what: str) -> None:
    """The host waits for its current stream."""
    RECORDER.note(rec.SYNCHRONISATION, what)
    RECORDER.join(RECORDER.host, RECORDER.clock(current_stream().actor))


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self.device_index = _index(device)
        touch(self.device_index)
        self.device = torch.device("cuda", self.device_index)
        self.number = next(_numbers) if number is None else number
        self.actor: Actor = ("stream", self.device_index, self.number)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        touch(self.device_index)
        RECORDER.launch(self.actor)
        RECORDER.join(self.actor, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        RECORDER.note(rec.SYNCHRONISATION, "Stream.synchronize")
        RECORDER.join(RECORDER.host, RECORDER.clock(self.actor))

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        touch(stream.device_index)
        RECORDER.launch(stream.actor)
        self.clock = dict(RECORDER.clock(stream.actor))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread():
            RECORDER.note(rec.SYNCHRONISATION, "Event.synchronize")
        RECORDER.join(RECORDER.host, self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    stream = _per_thread.streams.get(index)
    return default_stream(index) if stream is None else stream


def default_stream(device: Any = None) -> Stream:
    index = _index(device)
    if index not in _default_streams:
        _default_streams[index] = Stream(index, number=0)
    return _default_streams[index]


@contextlib.contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    index, device = stream.device_index, current_device()
    before = _per_thread.streams.get(index)
    set_device(index)
    _per_thread.streams[index] = stream
    try:
        yield
    finally:
        if before is None:
            del _per_thread.streams[index]
        else:
            _per_thread.streams[index] = before
        set_device(device)


def _synchronize(device: Any = None) -> None:
    index = _index(device)
    RECORDER.note(rec.SYNCHRONISATION, "torch.cuda.synchronize")
    for actor in [a for a in RECORDER._clocks if a[0] == "stream" and a[1] == index]:
        RECORDER.join(RECORDER.host, RECORDER.clock(actor))


class _Properties:
    name, major, minor = "Pretend H200", 9, 0
    multi_processor_count, total_memory = 132, MEMORY_BYTES


def install(library: ctypes.CDLL, home: int) -> None:
    """Take torch.cuda's place, with device `home` as that of this process."""
    from tests.pretend_cuda import tensor as pretend  # it needs RECORDER

    global _library, _home
    _library, _home = library, home
    set_device(home)
    api: dict[str, Any] = {
        "_lazy_init": lambda: None, "init": lambda: None, "is_initialized": lambda: True,
        "is_available": lambda: True, "device_count": lambda: NUM_DEVICES,
        "current_device": current_device, "set_device": set_device, "Event": Event,
        "Stream": Stream, "current_stream": current_stream, "default_stream": default_stream,
        "stream": stream_context, "synchronize": _synchronize,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties(),
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "empty_cache": lambda: None,
    }  # fmt: skip
    for name, function in api.items():
        setattr(torch.cuda, name, function)
    torch.__future__.set_swap_module_params_on_conversion(True)
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(module)._foreach_supported_types.append(pretend.PretendTensor)
    _follow_tasks()
    _follow_constants(pretend)


def _follow_tasks() -> None:
    """A task that is handed to a thread begins after what its giver has seen, and who takes its
    result has seen what the task has."""
    from tests.pretend_cuda import tensor as pretend

    submit, result = ThreadPoolExecutor.submit, Future.result

    def submit_and_follow(self: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = dict(RECORDER.clock(RECORDER.host))
        end: dict[str, Clock] = {}

        def task() -> Any:
            RECORDER.become(threading.current_thread().name)
            RECORDER.join(RECORDER.host, given)
            try:
                with pretend.PretendMode():
                    return function(*args, **kwargs)
            finally:
                end["clock"] = dict(RECORDER.clock(RECORDER.host))

        future = submit(self, task)
        future.__dict__["pretend_end"] = end
        return future

    def result_and_follow(self: Any, timeout: float | None = None) -> Any:
        try:
            return result(self, timeout)
        finally:
            end = self.__dict__.get("pretend_end", {})
            if "clock" in end:
                RECORDER.join(RECORDER.host, end["clock"])

    ThreadPoolExecutor.submit = submit_and_follow  # type: ignore[method-assign]
    Future.result = result_and_follow  # type: ignore[method-assign]


def _follow_constants(pretend: Any) -> None:
    """torch.tensor and its like make their tensor below the dispatcher: a copy from the host."""
    make, make_as, make_new = torch.tensor, torch.as_tensor, torch.Tensor.new_tensor

    def copied(data: Any, index: int, **options: Any) -> Any:
        cuda_stream = launch(index)
        synchronised("a constant copied from the host")
        held = make(data, **options)
        made = pretend.PretendTensor(held.detach(), index)
        RECORDER.written(cuda_stream, made.memory, "torch.tensor")
        return made.requires_grad_(held.requires_grad)

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            return copied(data, _index(device), **options)
        return make(data, device=device, **options)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        if isinstance(data, torch.Tensor) or device is None:
            return make_as(data, dtype=dtype, device=device)
        if torch.device(device).type == "cuda":
            return copied(data, _index(device), dtype=dtype)
        return make_as(data, dtype=dtype, device=device)

    def new_tensor(self: Any, data: Any, *, dtype: Any = None, device: Any = None, **more: Any):  # noqa: ANN202
        where = self.device if device is None else torch.device(device)
        if where.type != "cuda":
            return make_new(self, data, dtype=dtype, device=device, **more)
        return copied(data, _index(where), dtype=dtype or self.dtype, **more)

    torch.tensor, torch.as_tensor, torch.Tensor.new_tensor = tensor, as_tensor, new_tensor
