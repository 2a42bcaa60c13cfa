"""Lookup ops under the compiler."""

from __future__ import annotations

import pytest
import torch

import memkernels
from checks import WRITTEN, floats, gradients, opcheck
from lookup_cases import EXAMPLES, arguments_of
from test_lookup import DIFFERENTIABLE, each_differentiable
from tolerance import assert_same_bits

SMALL = {"tokens": 3, "dim": 5}


def internal(example, op=None, **changes):
    """An example's op, or one behind it, with small arguments."""
    public, arguments = arguments_of(example, **SMALL)
    return op or public, arguments | changes


def with_gradients(op, arguments):
    return op, arguments | {n: t.requires_grad_() for n, t in floats(arguments).items()}


OPCHECKS = {
    **{e: lambda e=e: with_gradients(*internal(e)) for e in DIFFERENTIABLE if e != "lsh_codes"},
    "lsh_codes": lambda: internal("lsh_codes"),  # opcheck cannot add its scores to its codes
    "int8_bags": lambda: internal("int8_bags"),
    "ngram_hash": lambda: internal("ngram_hash"),
    "embedding_bag_backward": lambda: internal("rows_of_a_gradient", "embedding_bag_backward"),
    "embedding_bag_dense": lambda: internal("rows_of_a_gradient", "embedding_bag_dense"),
    "embedding_bag_accumulate": lambda: internal(
        "accumulated_gradient", "embedding_bag_accumulate"
    ),
    "embedding_bag_weights": lambda: internal(
        "embedding_bag", "embedding_bag_weights", grad=torch.randn(3, 5)
    ),
    "row_sgd": lambda: internal("row_sgd"),
    "row_adagrad": lambda: internal("row_adagrad", eps=1e-8),
    "row_adam": lambda: internal("row_adam", beta1=0.9, beta2=0.99, eps=1e-8),
    "engram_gate_backward": lambda: internal(
        "engram_gate",
        "engram_gate_backward",
        dout=torch.randn(3, 4, 5),
        needs=15,
        eps=1e-6,
        sign="zero",
    ),
    "lsh_codes_backward": lambda: internal(
        "lsh_codes", "lsh_codes_backward", dscores=torch.randn(3, 16)
    ),
    "sparse_ffn_backward": lambda: internal(
        "sparse_ffn", "sparse_ffn_backward", dy=torch.randn(3, 8), needs=31
    ),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    op, arguments = OPCHECKS[case]()
    defaults = {"engram_gate": {"eps": 1e-6, "sign": "zero"}}
    opcheck(op, defaults.get(op, {}) | arguments)


@each_differentiable
def test_compile_forward_and_backward(example):
    function = getattr(memkernels, EXAMPLES[example])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, dim in (7, 12), (3, 9):
        _, arguments = arguments_of(example, tokens, dim)
        assert_same_bits(gradients(compiled, arguments), gradients(function, arguments))
    torch._dynamo.reset()


def test_compile_of_hashes_and_reads():
    """Engram: hashed rows of a quantised table."""

    def engram(hashes, table, scales):
        rows = memkernels.ngram_hash(**hashes)
        return memkernels.embedding_bag(rows.flatten(0, 1), table, scales=scales)

    compiled = torch.compile(engram, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in 5, 9:
        _, hashes = arguments_of("ngram_hash", tokens)
        hashes |= {"moduli": hashes["moduli"] % 9 + 1, "offsets": torch.arange(16) * 9}
        table = torch.randint(-128, 128, (160, 8)).to(torch.int8), torch.rand(160, 2)
        assert_same_bits(compiled(hashes, *table), engram(hashes, *table))
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ["row_sgd", "row_adagrad", "row_adam"])
def test_compile_of_a_step(op):
    """What a step writes, and what is computed from it afterwards."""

    def step(states, bag, **options):
        rows = memkernels.embedding_bag_backward(**bag)
        getattr(memkernels, op)(*states, *rows, **options)
        return states[0].sum(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    _, bag = arguments_of("rows_of_a_gradient")
    options = {"lr": 0.1} | ({"step": 3} if op == "row_adam" else {})
    states = [[torch.ones(90, 37) for _ in WRITTEN[op]] for _ in range(2)]
    expected = step(states[0], bag, **options)
    actual = compiled(states[1], bag, **options)
    assert_same_bits([actual, *states[1]], [expected, *states[0]])
    torch._dynamo.reset()


@pytest.mark.parametrize("example", ["embedding_bag", "sparse_ffn"])
def test_one_graph_for_any_number_of_tokens(example):
    op, arguments = arguments_of(example)
    function = getattr(memkernels, op)
    of_tokens = ("input", "per_sample_weights", "x", "indices", "weights")

    def first(count):
        return {
            n: v[:count] if n in of_tokens and v is not None else v for n, v in arguments.items()
        }

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda arguments: function(**arguments), fullgraph=True, dynamic=True, backend=counter
    )
    for count in 2, 3, 4:
        assert_same_bits(compiled(first(count)), function(**first(count)))
    assert counter.frame_count == 1
    torch._dynamo.reset()
