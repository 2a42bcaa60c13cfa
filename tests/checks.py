"""What the tests of an op with keyword arguments do with it, whatever the op."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from cases import arrays
from memkernels import fallback, reference
from tolerance import assert_accurate, unchanged

# What ops write, in place of returning it; embedding_bag_backward only if it is given.
WRITTEN = {
    "update_summaries": ["summary"],
    "embedding_bag_backward": ["out"],
    "row_sgd": ["param"],
    "row_adagrad": ["param", "sum"],
    "row_adam": ["param", "exp_avg", "exp_avg_sq"],
}


def at_random(**strategies):
    """`hypothesis.given`, with half the examples: a family has many ops, on two backends."""
    half = settings(max_examples=settings.default.max_examples // 2)
    return lambda test: half(given(**strategies)(test))


def tensors(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def outcome(ops, op, arguments):
    """What an op returns; of one that writes instead, what it has written."""
    written = [n for n in WRITTEN.get(op, []) if arguments.get(n) is not None]
    arguments = arguments | {name: arguments[name].clone() for name in written}
    with unchanged(*(value for name, value in arguments.items() if name not in written)):
        result = getattr(ops, op)(**arguments)
    if written:
        result = tuple(arguments[name] for name in written)
        return result if len(result) > 1 else result[0]
    return result


def check(ops, op, arguments, slack=1):
    """Against the reference: indices exactly, numbers as accurately as sums in float32 are."""
    actual = outcome(ops, op, arguments)
    exact = getattr(reference, op)(**arrays(arguments))
    baseline = outcome(fallback, op, arguments)
    if isinstance(actual, Tensor):
        check_result(actual, exact, baseline, slack)
    else:
        for each in zip(actual, exact, baseline, strict=True):
            check_result(*each, slack)
    return actual


def check_result(actual, exact, baseline, slack):
    if actual.is_floating_point():
        assert_accurate(actual, exact, baseline, dtype=actual.dtype, slack=slack)
    else:
        np.testing.assert_array_equal(actual.numpy(), exact)


def check_refused(ops, op, arguments, names):
    """By a message that names the op and one of the arguments, with nothing changed."""
    message = rf"{op}: .*\b({names})\b"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)


def check_error(ops, op, arguments, error):
    """error: (names, changes) of an ERRORS, changes a dict or what makes one of the arguments."""
    names, changes = error
    if callable(changes):
        changes = changes(SimpleNamespace(**arguments))
    check_refused(ops, op, arguments | changes, names)


def opcheck(op, arguments):
    op = getattr(torch.ops.memkernels, op).default
    schema = op._schema.arguments
    positional = [arguments.get(a.name) for a in schema if not a.kwarg_only]
    options = [a.name for a in schema if a.kwarg_only and a.name in arguments]
    torch.library.opcheck(op, positional, {name: arguments[name] for name in options})


def put(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


# ---- gradients -----------------------------------------------------------------------------------


def upstream(result):
    """Random gradients, the same numbers in every dtype; for what ignores its inputs, too."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype)


def floats(arguments):
    """The floating tensors, which are the differentiable ones."""
    return {name: t for name, t in tensors(arguments).items() if t.is_floating_point()}


def floating(result):
    """Of an op's results the one that has gradients."""
    if isinstance(result, Tensor):
        return result
    (result,) = (x for x in result if x.is_floating_point())
    return result


def gradients(function, arguments, names=None):
    """For the named arguments, by default all floating ones."""
    names = list(floats(arguments)) if names is None else names
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    result = floating(function(**arguments | leaves))
    grads = torch.autograd.grad(result, leaves.values(), upstream(result))
    return dict(zip(names, grads, strict=True))


def check_gradients(ops, op, arguments, slack=4):
    """Against autograd through the fallback, in float64."""
    actual = gradients(getattr(ops, op), arguments)
    in_float64 = {name: t.double() for name, t in floats(arguments).items()}
    exact = gradients(getattr(fallback, op), arguments | in_float64)
    baseline = gradients(getattr(fallback, op), arguments)
    for name, grad in actual.items():
        assert grad.dtype == arguments[name].dtype
        accuracy = {"dtype": grad.dtype, "name": f"gradient of {name}", "slack": slack}
        assert_accurate(grad, exact[name], baseline[name], **accuracy)
    return actual
