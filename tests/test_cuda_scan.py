"""CUDA kernels of the scan family under the host runner: the same bits for any schedule, no races,
no stray accesses, and indices out of range cut off where nothing checks them. What they compute is
tested beside the other backends (conftest.scan_ops)."""

from __future__ import annotations

import cuda_ops

CASES = {f.__name__: f for f in ()}
UNCHECKED = {f.__name__: f for f in ()}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
