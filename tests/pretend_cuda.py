"""A GPU that is not there: CPU tensors that say they are on "cuda", checked as CUDA checks its own.

    with pretend_cuda() as gpu:  # then anything with device=torch.device("cuda")
        ...
    gpu.waits, gpu.operations  # by module of spo

The CPU's kernels compute the values, so a run in fp32 gives the numbers of a run on the CPU. In forward
and backward passes an operation on tensors of two devices raises as on CUDA, and so does one of two
dtypes that the CPU takes and CUDA refuses; what CUDA's autocast casts is cast; every point where Python
waits for the GPU is recorded. Kernels, memory, speed and streams are not pretended.

The storage of a tensor carries a mark, so views and swaps of `.data` need no care. A TorchFunctionMode
answers `.device` and takes "cuda" out of the calls; a TorchDispatchMode looks at the marks of every
operation's inputs and marks its outputs.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

import spo

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_SPO = f"{Path(spo.__file__).parent}/"


class DeviceMismatch(RuntimeError):
    """Tensors of two devices in one operation."""


class DtypeMismatch(RuntimeError):
    """Floating-point numbers of two kinds in an operation that CUDA has for one kind only."""


def is_marked(tensor: Tensor) -> bool:
    # Inside vmap, with which transformers makes its masks, tensors have no storage.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not wrapped and getattr(tensor.untyped_storage(), "is_on_gpu", False)


def mark(value: Any, on_gpu: bool = True) -> Any:
    """Marks the tensors of a result, and returns the result."""
    for tensor in _tensors([value]):
        tensor.untyped_storage().is_on_gpu = on_gpu
    return value


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among the arguments of an operation, also those in lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _changed(kind: type | tuple[type, ...], change: Callable[[Any], Any], value: Any) -> Any:
    """Returns arguments in which `change` was applied to those of a kind, also in lists."""
    if isinstance(value, dict):
        return {name: _changed(kind, change, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(kind, change, part) for part in value]
    return change(value) if isinstance(value, kind) else value


class PretendedGpu:
    """Counters of what happened on the GPU, by the innermost module of spo on the stack."""

    def __init__(self) -> None:
        self.operations: Counter[tuple[str, str]] = Counter()  # (module, operation)
        self.waits: Counter[tuple[str, str]] = Counter()  # (module, "line: operation")

    def note(self, operation: str, waits: bool = False) -> None:
        module, line = _place()
        self.operations[module, operation] += 1
        if waits:
            self.waits[module, f"{line}: {operation}"] += 1


def by_module(counts: Counter[tuple[str, str]]) -> Counter[str]:
    """Returns the sums of a counter of PretendedGpu for each module of spo, as "method/rollout"."""
    total: Counter[str] = Counter()
    for (module, _), count in counts.items():
        total[module] += count
    return total


def _place() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_SPO):
            return file[len(_SPO) : -len(".py")], frame.f_lineno
        frame = frame.f_back
    return "", 0


# The operations that read their result's shape or value from the GPU.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount"}
_WAITS |= {"_unique2", "unique_consecutive", "unique_dim", "repeat_interleave"}
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# The CPU mixes fp32 weights with an input of 16 bits; all other products refuse on both.
_ONE_DTYPE = {"native_layer_norm", "native_group_norm"}


class _Operations(TorchDispatchMode):
    """Checks and marks every operation, also those of a backward pass."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        on_gpu = self.check(func, args, tensors) if any(map(is_marked, tensors)) else not tensors
        on_gpu = on_gpu and (bool(tensors) or _is_of_engine())
        out = func(*args, **kwargs)
        if on_gpu:
            _refuse_generator(func, kwargs)
            mark(out)
        return out

    def check(self, func, args, tensors) -> bool:
        """Tells if the operation runs on the GPU; raises what CUDA would."""
        name = func._schema.name.partition("::")[2]
        if name == "copy_":
            self.gpu.note(name, waits=is_marked(tensors[0]) != is_marked(tensors[1]))
            return is_marked(tensors[0])
        waits = name in _WAITS
        if name in _INDEXED:  # by indices of either device
            found = [index for index in args[1] if index is not None]
            tensors = [args[0], *args[2:3]]
            waits = any(not is_marked(i) or i.dtype in (torch.bool, torch.uint8) for i in found)
        self.gpu.note(name, waits)
        changed = tensors[0] if name.endswith("_") else None
        for tensor in tensors:
            # A number on the CPU is handed to the kernel, but by these.
            is_strict = tensor is changed or name.startswith(("cat", "stack", "_fused"))
            if not is_marked(tensor) and (tensor.dim() or is_strict):
                found = ", ".join(f"{'cuda' if is_marked(t) else 'cpu'} {t.shape}" for t in tensors)
                raise DeviceMismatch(f"{func}: expected all tensors on one device, found {found}")
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if name in _ONE_DTYPE and len(kinds) > 1:
            raise DtypeMismatch(f"{func}: expected one scalar type, found {kinds}")
        return True


def _autocast(*macros: str) -> set:
    """Returns the Python functions for the operations that a list of CUDA's autocast names."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists = [header.split(f"#define {macro}(_)")[1].split("\n\n")[0] for macro in macros]
    names = {name for text in lists for name in re.findall(r"_\((\w+)", text)}
    names |= {name.removeprefix("linalg_") for name in names}
    names |= {"interpolate"} if "upsample_nearest2d" in names else set()  # calls it
    names |= {f"__{r}{name}__" for name in names for r in ("", "r")}
    places = (torch, Tensor, F, torch._C._nn, torch.linalg)
    return {getattr(place, name) for name in names for place in places if hasattr(place, name)}


_LOW = _autocast("AT_FORALL_LOWER_PRECISION_FP")
_FULL = _autocast("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE") | {torch.norm, Tensor.norm}


class _Calls(TorchFunctionMode):
    """Answers what Python asks of devices."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.handlers = {
            Tensor.device.__get__: lambda f, a, k: CUDA if is_marked(a[0]) else f(*a, **k),
            Tensor.is_cuda.__get__: lambda f, a, k: is_marked(a[0]),
            Tensor.is_cpu.__get__: lambda f, a, k: f(*a, **k) and not is_marked(a[0]),
            Tensor.to: self.to,
            Tensor.cuda: lambda f, a, k: self.to(Tensor.to, (a[0], CUDA), {}),
            Tensor.cpu: lambda f, a, k: self.to(Tensor.to, (a[0], CPU), {}),
            Tensor.pin_memory: self.pin_memory,
            Tensor.backward: self.backward,
            Tensor.numpy: self.read,
            Tensor.__array__: self.read,
            Tensor.tolist: self.read,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if handler := self.handlers.get(func):
            return handler(func, args, kwargs)
        if func is Tensor.new_tensor and is_marked(args[0]):
            kwargs = {"device": CUDA} | kwargs
        if kwargs.get("device") is not None:
            return self.make(func, args, kwargs)
        if torch.is_autocast_enabled("cuda") and (func in _LOW or func in _FULL):
            args, kwargs = self.cast(func, args, kwargs)
        return func(*args, **kwargs)

    def make(self, func, args, kwargs):
        """Makes a tensor on the device that a call names."""
        device = torch.device(kwargs["device"])
        if device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        on_gpu = device.type == "cuda"
        if on_gpu:
            of_numbers = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            self.gpu.note(func.__name__, waits=of_numbers)
            _refuse_generator(func, kwargs)
        out = func(*args, **kwargs | {"device": CPU})
        return mark(out.clone() if any(out is value for value in args) else out, on_gpu)

    def cast(self, func, args, kwargs):
        """Casts the arguments as CUDA's autocast does."""
        if func in _FULL and kwargs.get("dtype") is not None:
            return args, kwargs
        target = torch.get_autocast_dtype("cuda") if func in _LOW else torch.float32
        kinds = (torch.float32, torch.float16, torch.bfloat16)

        def one(value: Tensor) -> Tensor:
            return value.to(target) if value.dtype in kinds and is_marked(value) else value

        return _changed(Tensor, one, (args, kwargs))

    def to(self, func, args, kwargs):
        """Moves or casts a tensor: to(device, dtype), to(other), with flags."""
        tensor, asked = args[0], [*args[1:], *kwargs.values()]
        here = there = is_marked(tensor)
        for value in asked:
            if isinstance(value, Tensor):
                there = is_marked(value)
            elif isinstance(value, str | torch.device):
                there = torch.device(value).type == "cuda"
        args, kwargs = _changed((str, torch.device), _without_gpu, (args, kwargs))
        moved = func(*args, **kwargs)
        if here == there or moved.is_meta:
            return moved
        pinned = getattr(tensor.untyped_storage(), "is_pinned", False)
        non_blocking = any(value is True for value in asked)
        self.gpu.note("to the CPU" if here else "to the GPU", waits=not (pinned and non_blocking))
        return mark(moved.clone() if moved is tensor else moved, there)

    def pin_memory(self, func, args, kwargs):
        pinned = args[0].clone()
        pinned.untyped_storage().is_pinned = True
        return pinned

    def backward(self, func, args, kwargs):
        loss, gradient = args[0], kwargs["gradient"]
        with self:  # which is off here: what is computed again in a backward pass must see the GPU
            _run_engine(loss, torch.ones_like(loss) if gradient is None else gradient)

    def read(self, func, args, kwargs):
        if is_marked(args[0]):
            if func is not Tensor.tolist:
                raise TypeError("can't convert cuda:0 tensor to numpy. Use Tensor.cpu() first")
            self.gpu.note("tolist", waits=True)
        return func(*args, **kwargs)


def _without_gpu(device: str | torch.device) -> torch.device:
    return CPU if torch.device(device).type == "cuda" else torch.device(device)


def _refuse_generator(func, kwargs) -> None:
    if kwargs.get("generator") is not None:
        raise DeviceMismatch(f"{func}: expected a generator on one device with the tensor")


def _run_engine(loss: Tensor, gradient: Tensor) -> None:
    flags = {"allow_unreachable": True, "accumulate_grad": True}
    torch.autograd.graph._engine_run_backward((loss,), (gradient,), False, False, (), **flags)


def _is_of_engine() -> bool:
    """Tells if autograd's engine makes a tensor on the GPU, as it does for lack of a gradient."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _Calls.__torch_function__.__code__:
        if frame.f_code is _run_engine.__code__:
            return is_marked(frame.f_locals["loss"])
        frame = frame.f_back
    return False


def make_graphed_callables(module, inputs, pool):
    """Pretends torch.cuda.make_graphed_callables: results lie where the next replay writes.

    The kernels run as written, on the memory that they were recorded with.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    own = [each.clone() for each in inputs]
    output, gradients = [], []

    def keep(kept: list[Tensor], values: Iterable[Tensor]) -> list[Tensor]:
        for i, value in enumerate(values):
            if i == len(kept):
                kept.append(value.detach().clone())
            kept[i].copy_(value)
        return [value.detach() for value in kept]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *_):
            with torch.enable_grad():
                ctx.output = module(*own)
            return keep(output, [ctx.output])[0]

        @staticmethod
        def backward(ctx, gradient):
            return (*keep(gradients, torch.autograd.grad(ctx.output, parameters, gradient)),)

    def replay(*given: Tensor) -> Tensor:
        assert pointers == [parameter.data_ptr() for parameter in module.parameters()]
        for mine, value in zip(own, given, strict=True):
            mine.copy_(value)
        if torch.is_grad_enabled():
            return Replayed.apply(*parameters)
        return keep(output, [module(*own)])[0]

    assert not torch.is_autocast_cache_enabled()
    return replay


@contextlib.contextmanager
def pretend_cuda() -> Iterator[PretendedGpu]:
    """Within the context there is one GPU, as far as Python can tell."""
    gpu = PretendedGpu()
    group = _foreach_utils._group_tensors_by_device_and_dtype
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns

    def grouped(*args, **kwargs):
        found = group(*args, **kwargs).items()
        return {(lists[0][0].device, dtype): (lists, i) for (_, dtype), (lists, i) in found}

    patches = [
        # Other tests leave the launcher's choice of the CPU behind.
        mock.patch.dict(
            "os.environ", {"ACCELERATE_TORCH_DEVICE": "cuda", "ACCELERATE_USE_CPU": "false"}
        ),
        mock.patch.dict("accelerate.state.PartialState._shared_state", clear=True),
        mock.patch.dict("accelerate.state.AcceleratorState._shared_state", clear=True),
        mock.patch("accelerate.state.check_cuda_p2p_ib_support", lambda: True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.cuda.max_memory_allocated", lambda *_: 0),
        mock.patch("torch.cuda.graph_pool_handle", object),
        mock.patch("torch.cuda.make_graphed_callables", make_graphed_callables),
        torch.backends.cudnn.flags(enabled=True),  # which a run sets for good
        # Its check of devices would run where handlers of this mode are at work, and see the CPU.
        mock.patch.dict(checks, {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}),
    ]
    for module in list(sys.modules.values()):
        if getattr(module, group.__name__, None) is group:
            patches.append(mock.patch.object(module, group.__name__, grouped))
    with contextlib.ExitStack() as stack:
        for context in (*patches, _Operations(gpu), _Calls(gpu)):
            stack.enter_context(context)
        yield gpu
