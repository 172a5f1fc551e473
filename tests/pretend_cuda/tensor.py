"""A tensor that says it lives on a CUDA device and holds its numbers on the CPU.

Every operator on one passes through dispatch(), which computes it on the CPU, tells the recorder
what memory it reads and writes on which stream, and notes what would make the host wait on a real
GPU, what would mix devices, and what would not be deterministic there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_cuda import device as cuda
from tests.pretend_cuda import recorder as rec
from tests.pretend_cuda.recorder import Memory

aten = torch.ops.aten
RECORDER = cuda.RECORDER

# Operators whose result, or the shape of it, the host must have before it goes on.
_SYNCHRONISE = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.unique_dim.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.equal.default, aten.bincount.default, aten.histc.default,
    aten.repeat_interleave.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
    aten.multinomial.default, aten.linalg_matrix_rank.default,
}  # fmt: skip
_SYNCHRONISE_UNLESS_ON_HOST = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor}  # the value
_NON_DETERMINISTIC = {
    aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default,
    aten.scatter_add.default, aten.cumsum.default, aten.histc.default, aten.bincount.default,
    aten.put_.default, aten.put.default, aten.kthvalue.default, aten.scatter_reduce.two,
    aten.scatter_reduce_.two, aten.embedding_dense_backward.default,
    aten.upsample_bilinear2d_backward.default, aten.adaptive_avg_pool2d_backward.default
    if hasattr(aten, "adaptive_avg_pool2d_backward") else aten.put_.default,
}  # fmt: skip
_INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
# Operators that refuse a number of the host (a CPU tensor without dimensions) beside CUDA tensors.
_REFUSE_NUMBERS = {
    aten.index_copy_.default, aten.index_copy.default, aten.index_add_.default,
    aten.index_add.default, aten.index_select.default, aten.gather.default, aten.scatter_.src,
    aten.scatter.src, aten.cat.default, aten.stack.default, aten.mm.default, aten.addmm.default,
    aten.addmm_.default, aten._fused_sgd_.default, aten._fused_adamw_.default,
    aten._amp_update_scale_.default, aten.copy_.default,
}  # fmt: skip


class PretendTensor(torch.Tensor):
    held: Tensor  # the numbers, on the CPU
    memory: Memory  # the same for all views of one allocation

    @staticmethod
    def __new__(cls, held: Tensor, index: int, memory: Memory | None = None) -> PretendTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device("cuda", index),
        )  # fmt: skip
        self.held = held
        self.memory = memory or Memory(RECORDER, cuda.current_stream(index).actor)
        return self

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.held}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


class PretendMode(TorchDispatchMode):
    """Sends what makes tensors on the device, and copies to it, to dispatch() too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


# --- Memory of the host that a stream uses while the host goes on -------------------------------

_host_memory: dict[int, Memory] = {}  # by storage


def _memory_of_host(tensor: Tensor) -> Memory:
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in _host_memory:
        _host_memory[key] = Memory(RECORDER, None)
        weakref.finalize(storage, _host_memory.pop, key, None)
    return _host_memory[key]


def _on_host(tensors: Sequence[Tensor], written: Sequence[Tensor], what: str) -> None:
    """The host itself reads or writes memory that a stream may be using."""
    if not _host_memory:
        return
    for tensor in tensors:
        if tensor.layout != torch.strided:
            continue
        memory = _host_memory.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            touch = RECORDER.written if any(tensor is one for one in written) else RECORDER.read
            touch(RECORDER.host, memory, what)


# --- What the schema of an operator says --------------------------------------------------------


class _Schema(NamedTuple):
    name: str
    written: list[tuple[int, str]]  # place and name of the arguments that it changes
    returned: list[int | None]  # for each result: which of `written` it is; None: another tensor
    viewed: int | None  # place of the argument of which the results are views


@functools.cache
def _schema(func: Any) -> _Schema:
    arguments, written, viewed = func._schema.arguments, [], None
    for place, argument in enumerate(arguments):
        if argument.alias_info is None:
            continue
        if argument.alias_info.is_write:
            written.append((place, argument.name))
        elif viewed is None:
            viewed = place
    sets = [arguments[place].alias_info.before_set for place, _ in written]
    returned = [
        sets.index(result.alias_info.before_set)
        if result.alias_info is not None and result.alias_info.before_set in sets
        else None
        for result in func._schema.returns
    ]
    return _Schema(func._schema.name, written, returned, viewed)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.held
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrapped(one) for one in value])
    return value


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _index_of(device: Any) -> int:
    index = torch.device(device).index
    return cuda.current_device() if index is None else index


# --- Dispatch -----------------------------------------------------------------------------------


def dispatch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func.namespace == "c10d":
        return _collective(func, args, kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    if func is aten._to_copy.default:
        return _to_copy(args[0], kwargs)
    if func is aten.copy_.default and (ours or _host_memory):
        return _copy(args, kwargs)
    if not ours:
        return _of_host(func, args, kwargs, tensors)
    if func is aten.record_stream.default:
        args[0].memory.recorded = True
        return None
    index = _one_device(func, args, ours, [t for t in tensors if not isinstance(t, PretendTensor)])
    schema = _schema(func)
    changed = [args[p] if p < len(args) else kwargs.get(name) for p, name in schema.written]
    _note(func, args)
    is_view = schema.viewed is not None and not schema.written
    if not is_view:
        stream = cuda.launch(index, "empty" not in schema.name)
        written = [*_tensors(changed)]
        for tensor in ours:
            if not any(tensor is one for one in written):
                RECORDER.read(stream, tensor.memory, schema.name)
        for tensor in written:
            assert isinstance(tensor, PretendTensor), f"{func} writes to memory of the host"
            RECORDER.written(stream, tensor.memory, schema.name)
    results = _compute(func, _unwrapped(args), {k: _unwrapped(v) for k, v in kwargs.items()})
    for tensor in _tensors(changed):
        if isinstance(tensor, PretendTensor) and tensor.shape != tensor.held.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place")
    device = kwargs.get("device")
    if device is not None and not _is_cuda(device):
        return results
    if device is not None:
        index = _index_of(device)
    memory = None
    if is_view:
        viewed = args[schema.viewed]
        memory = viewed.memory if isinstance(viewed, PretendTensor) else None
    if len(schema.returned) <= 1:
        kept = changed[schema.returned[0]] if schema.returned and schema.returned[0] is not None \
            else None  # fmt: skip
        return kept if kept is not None else _wrapped(results, index, memory, schema.name)
    return type(results)(
        changed[which] if which is not None else _wrapped(one, index, memory, schema.name)
        for one, which in zip(results, schema.returned, strict=True)
    )


def _wrapped(value: Any, index: int, memory: Memory | None, what: str) -> Any:
    if isinstance(value, Tensor):
        tensor = PretendTensor(value, index, memory)
        if memory is None:
            RECORDER.written(cuda.current_stream(index).actor, tensor.memory, what)
        return tensor
    if isinstance(value, (list, tuple)):
        return type(value)([_wrapped(one, index, memory, what) for one in value])
    return value


def _of_host(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """An operator without a tensor on the device; it may make one."""
    device = kwargs.get("device")
    if not _is_cuda(device):
        if _host_memory and tensors:
            schema = _schema(func)
            if schema.viewed is None or schema.written:
                changed = [args[p] if p < len(args) else kwargs.get(n) for p, n in schema.written]
                _on_host(tensors, [*_tensors(changed)], schema.name)
        return func(*args, **kwargs)
    index = _index_of(device)
    cuda.launch(index, "empty" not in _schema(func).name)
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": "cpu"}
    return _wrapped(func(*args, **kwargs), index, None, _schema(func).name)


def _one_device(func: Any, args: tuple, ours: list[PretendTensor], others: list[Tensor]) -> int:
    """The device of an operator's tensors.

    Raises:
        DeviceMix: they are on several, as CUDA builds of torch refuse it.
    """
    name, index = _schema(func).name, ours[0].device.index
    shapes = [(str(t.device), tuple(t.shape)) for t in (*ours, *others)]
    mix = any(tensor.device.index != index for tensor in ours)
    if func in _INDEXING:
        indices = [one for one in args[1] if one is not None]
        if not isinstance(args[0], PretendTensor):
            mix = True
        elif any(not isinstance(one, PretendTensor) for one in indices):
            RECORDER.note(rec.SYNCHRONISATION, f"{name} copies an index from the host")
        value = args[2] if len(args) > 2 else None
        if isinstance(value, Tensor) and not isinstance(value, PretendTensor):
            if value.dim():
                mix = True
            else:
                RECORDER.note(rec.SYNCHRONISATION, f"{name} copies a number from the host")
    elif name.startswith("aten::_foreach"):
        pass  # lists of several devices go tensor by tensor
    elif any(tensor.dim() for tensor in others) or (others and func in _REFUSE_NUMBERS):
        mix = True
    if mix:
        RECORDER.note(rec.MIX, f"{name} of {shapes}")
        raise rec.DeviceMix(f"{name}: tensors on several devices: {shapes} at {rec.place()}")
    return index


def _note(func: Any, args: tuple) -> None:
    if func in _SYNCHRONISE:
        on_host = func in _SYNCHRONISE_UNLESS_ON_HOST and not isinstance(args[2], PretendTensor)
        if not on_host:
            cuda.synchronised(_schema(func).name)
    if func in _NON_DETERMINISTIC and not _indices_differ(func, args):
        RECORDER.note(rec.NON_DETERMINISTIC, _schema(func).name)
    if func in _INDEXING and any(
        one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
    ):
        cuda.synchronised(f"{_schema(func).name} of a mask")


def _indices_differ(func: Any, args: tuple) -> bool:
    """Sums into places that all differ have no order."""
    if func not in (aten.index_add_.default, aten.index_add.default):
        return False
    return len(args[2].held.unique()) == args[2].held.numel()


def _compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU, whose build lacks some."""
    kwargs.pop("pin_memory", None)
    if _is_cuda(kwargs.get("device")):
        kwargs["device"] = "cpu"
    if func is aten.mm.dtype:
        return args[0].to(args[2]) @ args[1].to(args[2])
    if func is aten.mm.dtype_out:
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]), out=kwargs["out"])
    if func in (aten._assert_async.msg, aten._assert_async.default):
        assert bool(args[0]), args[1:] or "an assertion on the device failed"
        return None
    return func(*args, **kwargs)


# --- Copies -------------------------------------------------------------------------------------


def _to_copy(source: Tensor, kwargs: dict[str, Any]) -> Any:
    device, is_async = kwargs.get("device"), kwargs.get("non_blocking", False)
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    is_ours = isinstance(source, PretendTensor)
    to_cuda = _is_cuda(device) if device is not None else is_ours
    held = source.held if is_ours else source
    if not is_ours and not to_cuda:
        _on_host([source], [], "_to_copy")
        return aten._to_copy.default(source, **kwargs)
    if to_cuda:
        index = _index_of(device) if device is not None else source.device.index
        made = PretendTensor(aten._to_copy.default(held, **options), index)
        _transfer(made, source, is_async)
        return made
    out = aten._to_copy.default(held, **options)
    if is_async:  # torch allocates pinned memory for it
        out = out.pin_memory()
    _transfer(out, source, is_async)
    return out


def _copy(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    target, source = args[0], args[1]
    is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    if not isinstance(target, PretendTensor) and not isinstance(source, PretendTensor):
        _on_host([target, source], [target], "copy_")
        return aten.copy_.default(*args, **kwargs)
    if not isinstance(source, PretendTensor) and source.dim() == 0 and target.dim() > 0:
        is_async = True  # a fill
    _transfer(target, source, is_async)
    aten.copy_.default(_unwrapped(target), _unwrapped(source))
    return target


def _transfer(target: Tensor, source: Tensor, is_async: bool) -> None:
    """A copy of which at least one end is on a device: who reads and writes what, and who waits."""
    ours = [t for t in (target, source) if isinstance(t, PretendTensor)]
    host = [t for t in (target, source) if not isinstance(t, PretendTensor)]
    stream = cuda.launch(ours[0].device.index)
    what = f"copy of {tuple(target.shape)} {source.device} -> {target.device}"
    memories = [
        one.memory if isinstance(one, PretendTensor) else _memory_of_host(one)
        if one.is_pinned() else None
        for one in (source, target)
    ]  # fmt: skip
    if memories[0] is not None:
        RECORDER.read(stream, memories[0], what)
    if memories[1] is not None:
        RECORDER.written(stream, memories[1], what)
    if not host:
        return
    is_fill = host[0] is source and source.dim() == 0 and target.dim() > 0
    if not is_fill and not host[0].is_pinned() and is_async:
        RECORDER.note(rec.PAGEABLE, what)
        RECORDER.join(RECORDER.host, RECORDER.clock(stream))
    elif not is_async:
        cuda.synchronised(what)


# --- Collectives --------------------------------------------------------------------------------


def _collective(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A collective of the group's CPU backend on the numbers; on the device it is work of the
    current stream, as NCCL's is for those who wait for it."""
    for tensor in {id(t): t for t in _tensors(args)}.values():
        if isinstance(tensor, PretendTensor):
            stream = cuda.launch(tensor.device.index)
            RECORDER.written(stream, tensor.memory, func._schema.name)
        else:
            _on_host([tensor], [tensor], func._schema.name)
    out = func(*_unwrapped(args), **kwargs)
    if isinstance(out, (tuple, list)):  # the tensors, and the work to wait for
        return (args[0], *out[1:])
    return out
