"""What counts as accurate, in one place.

A result passes when its error against float64, both the largest and the root mean square, is at
most twice that of the straightforward same-dtype torch computation plus a few units in the last
place, *and* is small in itself. The straightforward computation is the fallback with every
intermediate in the input's own dtype.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch

from memkernels import fallback

ULPS = 2
ULPS_OF_FLOAT64 = 16  # the exact result is rounded to float64 as well, in another order


@contextlib.contextmanager
def straightforward():
    """Within, the fallback accumulates in the dtype of its inputs."""
    with mock.patch.object(fallback.attention, "_accumulator", lambda dtype: dtype):
        yield


def assert_accurate(actual, exact, baseline, *, dtype, name="result", slack=1):
    """Compares a tensor with float64 and with the straightforward computation.

    dtype is that of the op's inputs. slack widens the allowance: for gradients, which pass through
    more roundings, and for large logits, whose rounding errors the exponential multiplies.
    """
    actual, exact, baseline = (_float64(x) for x in (actual, exact, baseline))
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(actual[~finite], exact[~finite], err_msg=name)
    assert np.isfinite(actual[finite]).all(), f"{name}: not finite where it should be"
    if not finite.any():
        return
    actual, exact, baseline = actual[finite], exact[finite], baseline[finite]
    eps = torch.finfo(dtype).eps
    ulps = slack * (ULPS_OF_FLOAT64 if dtype == torch.float64 else ULPS)
    for measure in _largest, _root_mean_square:
        size = max(measure(exact), 1e-3)
        error, baseline_error = measure(actual - exact), measure(baseline - exact)
        small = (4 if dtype.itemsize == 2 else 64) * slack * eps * size
        allowed = min(2 * baseline_error + ulps * eps * size, small)
        assert error <= allowed, (
            f"{name}:{measure.__name__.replace('_', ' ')} error {error:.2e}, allowed {allowed:.2e} "
            f"(torch {baseline_error:.2e}, small {small:.2e}, size {size:.2e})"
        )


def slack_of(op, dtype):
    """What a backend's op declares to need in a dtype."""
    return getattr(op, "slack", {}).get(dtype, 1)


def check_attention(attention, case, slack=1):
    """Forward of a case, by a backend's op, against the reference."""
    slack = slack * slack_of(attention, case.q.dtype)
    # The backend runs first, so that it cannot find the answers in recycled memory.
    out, lse = attention(**case.arguments())
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.promote_types(case.q.dtype, torch.float32)
    exact_out, exact_lse = case.reference()
    with straightforward():
        baseline_out, baseline_lse = case.fallback()
    accuracy = {"dtype": case.q.dtype, "slack": slack}
    assert_accurate(out, exact_out, baseline_out, **accuracy, name="out")
    assert_accurate(lse, exact_lse, baseline_lse, **accuracy, name="lse")
    return out, lse


@contextlib.contextmanager
def unchanged(*tensors):
    """Asserts that the tensors hold the same bits afterwards."""
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    yield
    for old, new in zip(before, tensors, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def assert_same_bits(actual, expected):
    """Tensors, or sequences of them, equal to the bit; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def _largest(x):
    return np.abs(x).max()


def _root_mean_square(x):
    return np.sqrt(np.mean(x * x))


def _float64(x):
    """Complex numbers as pairs."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (torch.view_as_real(x) if x.is_complex() else x).double().numpy()
    return np.stack([x.real, x.imag], -1) if np.iscomplexobj(x) else np.asarray(x)
