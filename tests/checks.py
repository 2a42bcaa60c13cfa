"""What the tests of an op with keyword arguments do with it, whatever the op."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import memkernels
from cases import arrays
from memkernels import _C, _library, reference
from tolerance import assert_accurate, slack_of, unchanged

# What ops write, the steps beside what they return, others in its place; where it is given.
WRITTEN = {
    "update_summaries": ["summary"],
    "embedding_bag_backward": ["out"],
    "row_sgd": ["param"],
    "row_adagrad": ["param", "sum"],
    "row_adam": ["param", "exp_avg", "exp_avg_sq"],
    "linear_attention_step": ["state", "z"],
    "delta_rule_step": ["state"],
    "selective_scan_step": ["state"],
    "causal_conv1d_step": ["state"],
}
# Ops whose kernels multiply matrices of the dtype of their inputs.
OF_PRODUCTS = "linear_attention", "delta_rule"


class _Plain:
    """The public ops as they are where there are no kernels: in plain torch."""

    def __getattr__(self, op):
        function = getattr(memkernels, op)

        @functools.wraps(function)
        def run(*args, **options):
            with mock.patch.object(_library, "_BACKEND", "torch"):
                return function(*args, **options)

        return run


PLAIN = _Plain()


def at_random(**strategies):
    """`hypothesis.given`, with half the examples: a family has many ops, on two backends."""
    half = settings(max_examples=settings.default.max_examples // 2)
    return lambda test: half(given(**strategies)(test))


def tensors(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def outcome(ops, op, arguments):
    """What an op returns; of one that writes, what it has written, behind other results."""
    written = [n for n in WRITTEN.get(op, []) if arguments.get(n) is not None]
    arguments = arguments | {name: arguments[name].clone() for name in written}
    with unchanged(*(value for name, value in arguments.items() if name not in written)):
        result = getattr(ops, op)(**arguments)
    if written:
        states = tuple(arguments[name] for name in written)
        beside = () if result is None or result is states[0] else (result,)
        result = beside + states
        return result if len(result) > 1 else result[0]
    return result


def check(ops, op, arguments, slack=1):
    """Against the reference: indices exactly, numbers as accurately as sums in float32 are."""
    actual = outcome(ops, op, arguments)
    exact = getattr(reference, op)(**arrays(arguments))
    baseline = outcome(PLAIN, op, arguments)
    slack *= own_slack(ops, op, arguments)
    for each in zip(*(as_tuple(x) for x in (actual, exact, baseline)), strict=True):
        check_result(*each, slack, rounding(ops, op, arguments))
    return actual


def own_slack(ops, op, arguments):
    """What a backend's arithmetic takes beside what a test allows, by the first tensor's dtype."""
    main = next(iter(floats(arguments).values()), None)
    return 1 if main is None else slack_of(getattr(ops, op), main.dtype)


def rounding(ops, op, arguments):
    """The dtype that an op's products take their operands rounded to, whatever its results are in;
    None: they are not."""
    rounded = getattr(ops, "ROUNDED", (torch.bfloat16,) * (_C.cpu_isa() == "avx512_bf16"))
    if op not in OF_PRODUCTS:
        return None
    return next((t.dtype for t in floats(arguments).values() if t.dtype in rounded), None)


def check_result(actual, exact, baseline, slack, dtype=None):
    if actual is None:
        assert exact is None
    elif inexact(actual):
        dtype = dtype or actual.dtype.to_real()
        assert_accurate(actual, exact, baseline, dtype=dtype, slack=slack)
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


def inexact(value):
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def upstream(result):
    """Random gradients, the same numbers in every dtype; for what ignores its inputs, too."""
    if result.is_complex():
        return torch.view_as_complex(upstream(torch.view_as_real(result)))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype)


def floats(arguments):
    """The floating and complex tensors, which are the differentiable ones."""
    return {name: value for name, value in arguments.items() if inexact(value)}


def in_float64(arguments):
    """The floating and complex tensors, widened."""
    return {
        name: t.to(torch.promote_types(t.dtype, torch.float64))
        for name, t in floats(arguments).items()
    }


def floating(result):
    """Of an op's results the one that has gradients."""
    (result,) = (x for x in as_tuple(result) if inexact(x))
    return result


def gradients(function, arguments, names=None):
    """For the named arguments, by default all floating ones, through all results."""
    names = list(floats(arguments)) if names is None else names
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    results = as_tuple(function(**arguments | leaves))
    results = [x for x in results if inexact(x) and x.requires_grad]
    grads = torch.autograd.grad(
        results, leaves.values(), [upstream(x) for x in results], materialize_grads=True
    )
    return dict(zip(names, grads, strict=True))


def check_gradients(ops, op, arguments, slack=4):
    """Against autograd through the fallback, in float64."""
    actual = gradients(getattr(ops, op), arguments)
    exact = gradients(getattr(PLAIN, op), arguments | in_float64(arguments))
    baseline = gradients(getattr(PLAIN, op), arguments)
    slack *= own_slack(ops, op, arguments)
    for name, grad in actual.items():
        assert grad.dtype == arguments[name].dtype
        dtype = rounding(ops, op, arguments) or grad.dtype.to_real()
        accuracy = {"dtype": dtype, "name": f"gradient of {name}", "slack": slack}
        assert_accurate(grad, exact[name], baseline[name], **accuracy)
    return actual
