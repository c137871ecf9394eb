"""A CUDA device without a GPU: to PyTorch its tensors are on ``cuda:0``; their data are on the CPU.

Import this module before torch: it makes the device, for the rest of the process. Operations run
inside ``Device()``: autograd, autocast and dispatch are CUDA's, and an operation on tensors of two
devices fails. Each operation that would start a kernel is counted in ``LAUNCHES``, and each place
where the host would wait for the device in ``WAITS``. That proves devices, dtypes and control flow;
it proves nothing about kernels and speed. Building it needs g++.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib.util
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build() -> None:
    """Compiles and loads what tells PyTorch that there is a device: it asks when it starts."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    include, library = (Path(spec.origin).parent / name for name in ("include", "lib"))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "pretend_cuda.so"
        subprocess.run(
            ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}", "-o", built,
             Path(__file__).with_suffix(".cpp"), f"-L{library}", "-lc10"],
            check=True,
        )  # fmt: skip
        for path in (library / "libc10.so", library / "libtorch_cpu.so", built):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


build()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

CUDA = torch.device("cuda:0")
LAUNCHES: collections.Counter[str] = collections.Counter()  # by operation
WAITS: collections.Counter[str] = collections.Counter()  # by operation and line
# Operations that start no kernel: views, and memory that is not filled.
WITHOUT_KERNEL = set(
    "_reshape_alias _unsafe_view alias as_strided chunk detach diagonal empty empty_like "
    "empty_strided expand is_same_size lift_fresh mH mT narrow new_empty new_empty_strided "
    "permute reshape scalar_tensor select slice split split_with_sizes squeeze t transpose "
    "unbind unfold unsqueeze view".split()
)
# Operations whose result's size or value the host needs.
WAITING = set(
    "_local_scalar_dense _unique2 equal is_nonzero item masked_select nonzero repeat_interleave "
    "unique_consecutive unique_dim".split()
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Stream:
    """A stream of the device: everything is done at once, so there is nothing to wait for."""

    def wait_stream(self, other: Stream) -> None: ...


class CudaTensor(Tensor):
    """A tensor on the device; ``data_on_cpu`` holds its values."""

    data_on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> CudaTensor:
        tensor: CudaTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        tensor.data_on_cpu = data
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        count_wait("tolist")
        return self.data_on_cpu.tolist()

    def record_stream(self, stream: Stream) -> None: ...  # type: ignore[override]


class Device(TorchDispatchMode):
    """Inside, tensors may be moved to the device and made there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the data, and counts it."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    device = kwargs.get("device")
    goes_to_cuda = device is not None and torch.device(device).type == "cuda"
    is_ours = any(isinstance(x, CudaTensor) for x in tensors)
    if not is_ours and not goes_to_cuda:
        return func(*args, **kwargs)
    # Step 1: copies between devices.
    if name == "_to_copy":
        source = args[0]
        result = func(unwrap(source), **{k: v for k, v in kwargs.items() if k != "device"})
        if device is not None and not goes_to_cuda:
            count_wait("copy to the host")
            return result
        LAUNCHES[name] += 1
        return wrap(result.clone() if result is unwrap(source) else result)
    if name == "copy_":
        if not isinstance(args[0], CudaTensor):
            count_wait("copy to the host")
        LAUNCHES[name] += 1
        unwrap(args[0]).copy_(unwrap(args[1]))
        return args[0]
    # Step 2: checks and counts.
    on_host = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim > 0]
    if is_ours and on_host:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
    if name in WAITING and kwargs.get("output_size") is None:
        count_wait(name)
    if name in INDEXING and any(x is not None and x.dtype is torch.bool for x in args[1]):
        count_wait(f"{name} by bool")
    if name not in WITHOUT_KERNEL:
        LAUNCHES[name] += 1
    # Step 3: the operation.
    kwargs = {k: "cpu" if k == "device" and v is not None else v for k, v in kwargs.items()}
    plain_args, plain_kwargs = tree_map(unwrap, (args, kwargs))
    if name in ("_softmax", "_log_softmax") and plain_args[2]:  # half to float: CUDA's only
        plain_args = plain_args[0].float(), plain_args[1], False
    result = func(*plain_args, **plain_kwargs)
    if name == "_local_scalar_dense":
        return result
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(wrap, result)


def wrap(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


def unwrap(x: Any) -> Any:
    return x.data_on_cpu if isinstance(x, CudaTensor) else x


def count_wait(what: str) -> None:
    """Counts a wait, with the nearest line of the package."""
    for frame in reversed(traceback.extract_stack()):
        if "hrm_esp" in Path(frame.filename).parts:
            WAITS[f"{what}, {Path(frame.filename).name}:{frame.lineno}"] += 1
            return
    WAITS[what] += 1


def with_fallback(original: Callable[..., Tensor], on_device: Callable[..., Tensor]) -> Any:
    """Returns a function that calls ``on_device`` for tensors on the device."""

    @functools.wraps(original)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (on_device if isinstance(x, CudaTensor) else original)(x, *args, **kwargs)

    return call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention: one kernel, and one for its gradients."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(dtype) for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype
    result: Tensor = Attention.apply(q, k, v, attn_mask, is_causal)
    return result


class Attention(torch.autograd.Function):
    """Computes gradients by computing the result again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool) -> Tensor:
        ctx.inputs, ctx.keywords = (q, k, v), {"attn_mask": unwrap(mask), "is_causal": causal}
        LAUNCHES["scaled_dot_product_attention"] += 1
        q, k, v = map(unwrap, ctx.inputs)
        result: Tensor = wrap(F.scaled_dot_product_attention(q, k, v, **ctx.keywords))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        LAUNCHES["scaled_dot_product_attention backward"] += 1
        inputs = [unwrap(x).detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            output = F.scaled_dot_product_attention(*inputs, **ctx.keywords)
        grads = torch.autograd.grad(output, inputs, unwrap(grad))
        return (*map(wrap, grads), None, None)


class RMSNorm(torch.autograd.Function):
    """F.rms_norm: one kernel, and one for the gradient of each input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor | None, eps: float) -> Tensor:
        assert weight is None or weight.dtype == x.dtype
        ctx.inputs, ctx.shape, ctx.eps = [x] if weight is None else [x, weight], shape, eps
        LAUNCHES["rms_norm"] += 1
        result: Tensor = wrap(F.rms_norm(unwrap(x), shape, unwrap(weight), eps))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        LAUNCHES["rms_norm backward"] += len(ctx.inputs)
        inputs = [unwrap(x).detach().requires_grad_() for x in ctx.inputs]
        x, weight = (*inputs, None)[:2]
        with torch.enable_grad():
            output = F.rms_norm(x, ctx.shape, weight, ctx.eps)
        grads = [wrap(g) for g in torch.autograd.grad(output, inputs, unwrap(grad))]
        return grads[0], None, grads[1] if len(grads) > 1 else None, None


def install() -> None:
    """Replaces what asks for a GPU."""
    answers: dict[str, Any] = {
        "_lazy_init": None, "is_available": True, "is_bf16_supported": True, "current_device": 0,
        "device_count": 1, "manual_seed_all": None, "manual_seed": None, "synchronize": None,
        "get_device_capability": (9, 0), "get_arch_list": [], "current_stream": Stream(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream = lambda *_, **__: Stream()  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    F.scaled_dot_product_attention = with_fallback(  # type: ignore[assignment]
        F.scaled_dot_product_attention, attention
    )
    F.rms_norm = with_fallback(F.rms_norm, RMSNorm.apply)  # type: ignore[assignment]


install()
