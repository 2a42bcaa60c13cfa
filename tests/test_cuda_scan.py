"""CUDA kernels of the scan family under the host runner: the same bits for any schedule, no races,
no stray accesses, and indices out of range cut off where nothing checks them. What they compute is
tested beside the other backends (conftest.scan_ops)."""

from __future__ import annotations

import torch

import cuda_ops
from scan_cases import delta_case, linear_case
from tolerance import assert_same_bits

# ---- the chunk engine ----------------------------------------------------------------------------


# Heads that share queries; aligned rows and not; every class of K, and several blocks of V.
LINEAR = {
    "bf16": (([70, 0, 5], (1, 2), (16, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_v": (((1, 70), (1, 1), (80, 136)), {"normalize": True, "dtype": torch.float16}),
    "wide_k": (((1, 35), (1, 1), (200, 8)), {"gate": "head"}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "token", "normalize": True, "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "states": True}),
}
DELTA = {
    "bf16": (([70, 0, 5], (1, 2), (72, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_k": (((1, 35), (1, 1), (136, 40)), {"qk_l2norm": True, "dtype": torch.float16}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "head", "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "dtype": torch.bfloat16}),
}


def chunk_scans(run):
    results = [
        run("linear_attention", **linear_case(*c, **options)) for c, options in LINEAR.values()
    ]
    return results + [
        run("delta_rule", **delta_case(*c, **options)) for c, options in DELTA.values()
    ]


def scans_in_segments(run):
    """There are two, and one."""
    lengths = [2100, 30]
    sizes = lengths, (1, 1), (8, 8)
    return [
        run("linear_attention", **linear_case(*sizes, gate="token", dtype=torch.bfloat16)),
        run("delta_rule", **delta_case(*sizes, states=True, dtype=torch.bfloat16)),
    ]


def chunks_of_wild_offsets(run):
    """Offsets are cut off at the tokens."""
    for op, case in ("linear_attention", linear_case), ("delta_rule", delta_case):
        arguments = case([40, 30], (1, 1), (8, 8), gate="token", states=True)
        expected = run(op, **arguments)
        for wild in [-7, 40, 71], [-(2**40), 40, 2**40]:
            offsets = {"cu_seqlens": torch.tensor(wild)}
            assert_same_bits(run(op, **arguments | offsets), expected)
        for wild in [70, 2**40, -(2**40)], [2**40, -(2**40), 2**50], [30, 70, 10]:
            run(op, **arguments | {"cu_seqlens": torch.tensor(wild)})


CASES = {
    f.__name__: f
    for f in (
        chunk_scans,
        scans_in_segments,
    )
}
UNCHECKED = {f.__name__: f for f in (chunks_of_wild_offsets,)}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
