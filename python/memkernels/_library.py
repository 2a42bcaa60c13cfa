"""Loads the compiled libraries and holds what every family's ops need around them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_OLDEST_TORCH = (2, 10)


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(f"memkernels needs torch >= {oldest}, found {torch.__version__}")


_check_torch()

from memkernels import _C  # noqa: E402  (an old torch is to be named before anything fails to load)

torch.ops.load_library(str(pathlib.Path(_C.__file__).parent / "memkernels_torch.so"))

# Python-side registrations (fake, autograd, autocast) live as long as this object.
library = torch.library.Library("memkernels", "FRAGMENT")

_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack


def wants_gradient(*tensors: Tensor | None) -> bool:
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def below_autograd(*tensors: Tensor | None) -> bool:
    """True where a call may skip the autograd layer: nothing asks for a gradient, and neither
    the compiler nor a functorch transform nor forward mode is looking, so that all the layer
    would add is microseconds."""
    if _compiling() or _transform() is not None or forward_ad._current_level >= 0:
        return False
    return not wants_gradient(*tensors)


_BACKEND = os.environ.get("MEMKERNELS_BACKEND") or "native"
if _BACKEND not in ("native", "torch"):
    raise ImportError(f"MEMKERNELS_BACKEND must be native or torch, got {_BACKEND!r}")


# (op, device type) of every native kernel of this build. A set, since the compiler must see
# through the choice of the fallback.
_KERNELS = frozenset(
    (name.removeprefix("memkernels::"), device)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("memkernels::")
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
)


def has_kernel(op: str, device: str) -> bool:
    """Whether this build has a kernel of its own, for a device type such as "cuda"."""
    return (op, device) in _KERNELS


def use_fallback(t: Tensor, op: str, *differentiable: Tensor | None) -> bool:
    """True where the plain torch implementation is to run: with ``MEMKERNELS_BACKEND=torch``, or
    on a device for which this build has no kernel; no backward one, if a gradient is asked for."""
    if _BACKEND == "torch":
        return True
    if t.is_cpu or t.is_meta:
        return False
    if not has_kernel(op, t.device.type):
        return True
    return wants_gradient(*differentiable) and not has_kernel(f"{op}_backward", t.device.type)


def no_gradient(
    op: str, tensors: dict[str, Tensor | None], why: str = "it writes in place"
) -> None:
    """Refuses an op without a backward where autograd would have to follow it."""
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not backward and not forward:
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dual = forward and forward_ad.unpack_dual(tensor).tangent is not None
        if dual or (backward and tensor.requires_grad):
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} is not differentiable: "
                f"{why}; call it under torch.no_grad()"
            )


def bump_versions(*tensors: Tensor) -> None:
    """Tells autograd that the tensors were written; inference tensors keep no count."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def call(op: Callable, differentiable: tuple[Tensor | None, ...], *args, **options):
    """Calls a torch op, past the autograd layer if nothing asks for the gradient of these."""
    if not _compiling() and forward_ad._current_level >= 0:
        for tensor in differentiable:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                name = op._name.removeprefix("memkernels::")
                raise RuntimeError(f"{name}: not differentiable in forward mode")
    if below_autograd(*differentiable):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **options)
    return op(*args, **options)


def call_in_place(op: Callable, mutated: tuple[Tensor, ...], *args, **options):
    """The same of an op that is in_place() and writes these."""
    if below_autograd(*(arg for arg in args if isinstance(arg, Tensor))):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args, **options)
        bump_versions(*mutated)
        return result
    return op(*args, **options)


def once_differentiable(op: str) -> None:
    """Makes differentiating ``{op}_backward`` an error instead of a silent constant."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op}: once differentiable; its backward has no gradient")

    torch.library.register_autograd(f"memkernels::{op}_backward", refuse, lib=library)


def not_differentiable(op: str, why: str = "it has no backward") -> None:
    """Makes autograd raise an error where it would lose a gradient."""
    overload = getattr(torch.ops.memkernels, op).default
    names = [argument.name for argument in overload._schema.arguments]

    def autograd(keyset, *args, **kwargs):
        given = zip(names, args, strict=False)
        no_gradient(op, {name: a for name, a in given if isinstance(a, Tensor)}, why)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(op, autograd, "Autograd", with_keyset=True)


def in_place(op: str, mutated: tuple[str, ...]) -> None:
    """Gives a mutating op what autograd expects of one: an error where a gradient would be lost,
    and a raised version counter, which tells it that saved tensors have changed. A caller that
    is below_autograd may go past both and call bump_versions itself."""
    not_differentiable(op, "it writes in place")
    overload = getattr(torch.ops.memkernels, op).default
    names = [argument.name for argument in overload._schema.arguments]
    indices = [names.index(name) for name in mutated]

    def bump(keyset, *args, **kwargs):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = overload.redispatch(
                keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs
            )
        bump_versions(*(args[i] for i in indices if args[i] is not None))
        return result

    library.impl(op, bump, "ADInplaceOrView", with_keyset=True)


def autocasts(t: Tensor) -> bool:
    """Floating tensors that autocast touches: all but float64, as in torch."""
    return t.is_floating_point() and t.dtype != torch.float64


def register_autocast(op: str, cast: Callable) -> None:
    """``cast(dtype, *args, **kwargs)`` returns the (args, kwargs) to run the op with."""
    overload = getattr(torch.ops.memkernels, op).default

    def rule(device: str) -> Callable:
        def run(*args, **kwargs):
            args, kwargs = cast(torch.get_autocast_dtype(device), *args, **kwargs)
            with torch.autocast(device, enabled=False):
                return overload(*args, **kwargs)

        return run

    library.impl(op, rule("cpu"), "AutocastCPU")
    library.impl(op, rule("cuda"), "AutocastCUDA")
