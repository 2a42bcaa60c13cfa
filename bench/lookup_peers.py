"""What the lookup ops are measured against; see `peers`, whose adapters these resemble."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers import Absent, Peer

# ---- bags ----------------------------------------------------------------------------------------


@dataclass
class Bags:
    """Weighted sums of a table's rows, and the gradient of their result. Several sets of indices
    take turns."""

    table: Tensor  # [N, D]
    indices: Tensor  # [sets, T, K], int64
    factors: Tensor  # [T, K], the dtype of table
    grad: Tensor  # [T, D]

    def turns(self) -> Iterator[Tensor]:
        return itertools.cycle(self.indices)

    def flat_turns(self) -> Iterator[Tensor]:
        return itertools.cycle(self.indices.flatten(1))

    @property
    def offsets(self) -> Tensor:
        """Where each bag of the flat indices begins, and where the last one ends."""
        bags, size = self.factors.shape
        return torch.arange(bags + 1) * size


def copied(table: Tensor) -> Tensor:
    """A copy in large pages, as other caches and tables here."""
    copy = torch.empty_like(table)
    if copy.is_cpu:
        torch.ops.memkernels._advise_huge_pages(copy)
    return copy.copy_(table)


torch_sum = partial(F.embedding_bag, mode="sum")


def torch_bag(x: Bags) -> dict[str, Peer]:
    turns = x.turns()
    return {"torch": lambda: torch_sum(next(turns), x.table, per_sample_weights=x.factors)}


def fbgemm(x: Bags, optimiser: str = "EXACT_SGD", **options) -> Callable:
    """FBGEMM's table-batched embedding with a copy of the table: its forward, whose backward steps
    the optimiser. Without its check of the indices."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            BoundsCheckMode,
            EmbeddingLocation,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError) as error:
        raise Absent(f"FBGEMM (pip install --no-deps fbgemm-gpu-cpu==1.8.0): {error}") from error
    precision = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16}
    if x.table.dtype not in precision:
        raise Absent(f"FBGEMM: no {x.table.dtype}")
    place = EmbeddingLocation.HOST, ComputeDevice.CPU
    if x.table.is_cuda:
        place = EmbeddingLocation.DEVICE, ComputeDevice.CUDA
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*x.table.shape, *place)],
        optimizer=EmbOptimType[optimiser],
        weights_precision=precision[x.table.dtype],
        bounds_check_mode=BoundsCheckMode.NONE,
        **options,
    )
    (table,) = module.split_embedding_weights()
    if table.is_cpu:
        torch.ops.memkernels._advise_huge_pages(table)
    table.copy_(x.table)
    return module


def fbgemm_bag(x: Bags) -> dict[str, Peer]:
    """Its result is float32, whatever the table is."""
    module, turns, offsets = fbgemm(x), x.flat_turns(), x.offsets
    factors = x.factors.flatten().float()
    return {"FBGEMM": lambda: module(next(turns), offsets, factors)}


BAG = torch_bag, fbgemm_bag


def byte_bag(x: Bags, scales: Tensor) -> dict[str, Peer]:
    """torch's rows of bytes, which hold factor and offset at their end: ``factor * byte + offset``
    is what int8 rows with one factor each hold."""
    bias = -128 * scales
    rows = (x.table.short() + 128).byte()
    packed = copied(torch.cat([rows, scales.view(torch.uint8), bias.view(torch.uint8)], 1))
    turns, offsets, factors = x.flat_turns(), x.offsets, x.factors.flatten()
    op = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return {
        "torch quantized": lambda: op(
            packed, next(turns), offsets, per_sample_weights=factors, include_last_offset=True
        )
    }


def dequantised(x: Bags, scales: Tensor) -> dict[str, Peer]:
    """Gathered, multiplied by the factors of their blocks, added up."""
    turns, blocks = x.turns(), scales.shape[1]
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)

    def gathered(t, indices):
        return t.view(torch.uint8)[indices].view(t.dtype).float()  # as bytes, which is faster

    def run():
        indices = next(turns)
        rows = gathered(x.table, indices).unflatten(-1, (blocks, -1))
        rows = (rows * gathered(scales, indices)[..., None]).flatten(2)
        return (x.factors[:, None] @ rows).squeeze(1)

    return {"torch gather, matmul": run}


# ---- training of a table -------------------------------------------------------------------------


def gradients(bag: Callable, x: Bags, *, coalesced: bool = False) -> Peer:
    """Forward and backward: the gradients of table and factors."""
    leaves = [t.detach().requires_grad_() for t in (x.table, x.factors)]
    turns = x.turns()

    def run():
        out = bag(next(turns), leaves[0], per_sample_weights=leaves[1])
        of_table, of_factors = torch.autograd.grad(out, leaves, x.grad)
        if coalesced:
            of_table = of_table.coalesce()
        if of_table.is_sparse:
            return lambda: (of_table.to_dense(), of_factors)
        return of_table, of_factors

    return run


def torch_step(optimiser: Callable, x: Bags, *, sparse: bool) -> Peer:
    """Forward, backward and a step of one of torch's optimisers, on a copy of the table."""
    table = nn.Parameter(copied(x.table))
    factors = x.factors.detach().requires_grad_()
    optimiser, turns = optimiser([table]), x.turns()

    def run():
        out = torch_sum(next(turns), table, per_sample_weights=factors, sparse=sparse)
        table.grad, of_factors = torch.autograd.grad(out, [table, factors], x.grad)
        optimiser.step()
        table.grad = None
        return table.detach(), of_factors

    return run


def fbgemm_step(x: Bags, optimiser: str, **options) -> dict[str, Peer]:
    """FBGEMM's forward and its backward: the gradient of the factors, and the table's, which it
    applies row by row and never keeps."""
    module = fbgemm(x, optimiser, **options)
    (table,) = module.split_embedding_weights()
    turns, offsets = x.flat_turns(), x.offsets
    factors = x.factors.flatten().requires_grad_()

    def run():
        out = module(next(turns), offsets, factors)
        (of_factors,) = torch.autograd.grad(out, [factors], x.grad)
        return table, of_factors.view_as(x.factors)

    return {"FBGEMM, fused": run}


# ---- product keys --------------------------------------------------------------------------------


def product_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Of query [T, H, 2, Dk] and keys [H, 2, N, Dk], as [H, 2, T, N]."""
    return query.permute(1, 2, 0, 3) @ keys.mT


def product_keys(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of all k * k pairs of the halves' best."""
    values, order = product_scores(query, keys).topk(k)  # [H, 2, T, k]
    sums = (values[:, 0, :, :, None] + values[:, 1, :, None, :]).flatten(2)
    index = (order[:, 0, :, :, None] * keys.shape[2] + order[:, 1, :, None, :]).flatten(2)
    scores, chosen = sums.topk(k)
    return scores.transpose(0, 1), index.gather(2, chosen).transpose(0, 1)


def product_keys_pruned(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same of those pairs that fewer than k others precede for certain."""
    rank = torch.arange(1, k + 1)
    first, second = (rank[:, None] * rank <= k).nonzero(as_tuple=True)
    values, order = product_scores(query, keys).topk(k)
    scores, chosen = (values[:, 0][..., first] + values[:, 1][..., second]).topk(k)
    first, second = first[chosen], second[chosen]  # ranks in the halves
    index = order[:, 0].gather(2, first) * keys.shape[2] + order[:, 1].gather(2, second)
    return scores.transpose(0, 1), index.transpose(0, 1)


def product_keys_chunked(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same for 256 tokens at a time, whose scores stay in a cache."""
    parts = [product_keys_pruned(part, keys, k) for part in query.split(256)]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


PRODUCT_KEYS = {
    "torch, all pairs": product_keys,
    "torch, fewest pairs": product_keys_pruned,
    "torch, fewest pairs, 256 tokens at a time": product_keys_chunked,
}

# ---- layers --------------------------------------------------------------------------------------


class Layer:
    """A layer of product keys with the weights of ours. `parameters` are named as ours are."""

    def __init__(
        self, name: str, module: nn.Module, parameters: dict[str, nn.Parameter], ours: nn.Module
    ):
        self._shapes = {key: parameter.shape for key, parameter in ours.named_parameters()}
        self._heads, self._halves, _, self._half = ours.keys.shape
        self.name, self.module = name, module
        self.parameters = {key: parameters[key] for key in self._shapes}
        for key, parameter in ours.named_parameters():
            view = self._view(key, self.parameters[key])
            view.copy_(parameter.view(view.shape))

    def as_ours(self, key: str, gradient: Tensor) -> Tensor:
        return self._view(key, gradient).reshape(self._shapes[key])

    def _view(self, key: str, t: Tensor) -> Tensor:
        """Theirs in our order: they have the halves of queries outside the heads, and those of keys
        innermost but one."""
        if key == "query_proj.weight":
            return t.view(self._halves, self._heads, self._half, -1).transpose(0, 1)
        return t.transpose(1, 2) if key == "keys" else t


def product_key_memory(ours: nn.Module) -> Layer:
    """Its default is a layer norm of queries."""
    try:
        from product_key_memory import PKM
    except ImportError as error:
        raise Absent(f"product-key-memory: {error}") from error
    heads, _, num_keys, half = ours.keys.shape
    dim = ours.values.shape[1]
    module = PKM(dim, heads=heads, num_keys=num_keys, topk=ours.k, dim_head=half)
    parameters = {
        "query_proj.weight": module.to_queries.weight,
        "keys": module.keys,
        "query_norm.weight": module.norm.weight,
        "query_norm.bias": module.norm.bias,
        "values": module.values.weight,
    }
    return Layer("product-key-memory", module, parameters, ours)


def peer_pytorch(ours: nn.Module) -> Layer:
    """With the paper's softmax: its default keeps one expert a head."""
    try:
        from PEER_pytorch import PEER
    except ImportError as error:
        raise Absent(f"PEER-pytorch: {error}") from error
    (heads, _, _, half), (experts, dim) = ours.keys.shape, ours.up.shape
    module = PEER(
        dim,
        heads=heads,
        num_experts=experts,
        num_experts_per_head=ours.k,
        dim_key=half,
        non_competing_scores=False,
    )
    parameters = {
        "query_proj.weight": module.to_queries[0].weight,
        "keys": module.keys,
        "up": module.weight_down_embed.weight,
        "down": module.weight_up_embed.weight,
    }
    return Layer("PEER-pytorch", module, parameters, ours)


# ---- hashes, gates, neurons ----------------------------------------------------------------------


@dataclass
class Hash:
    """N-grams of all orders from 2 to that of the multipliers."""

    token_ids: Tensor  # [B, T], int64
    multipliers: Tensor
    moduli: Tensor
    offsets: Tensor
    pad_id: int

    @property
    def orders(self) -> list[int]:
        return list(range(2, len(self.multipliers) + 1))


def onnx_session(operator: str, inputs: dict, outputs: dict, **attributes):
    """A session of one of ONNX Runtime's own operators; inputs and outputs are arrays or None by
    name."""
    try:
        import onnxruntime
        from onnx import helper
    except ImportError as error:
        raise Absent(f"ONNX Runtime (pip install onnxruntime onnx): {error}") from error
    domain, names = "com.microsoft", [name if x is not None else "" for name, x in inputs.items()]
    node = helper.make_node(operator, names, list(outputs), domain=domain, **attributes)

    def described(arrays):
        return [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in arrays.items()
            if array is not None
        ]

    graph = helper.make_graph([node], operator, described(inputs), described(outputs))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its workers stay busy for a while beside what is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def onnx_hash(x: Hash) -> dict[str, Peer]:
    ids = x.token_ids.numpy()
    inputs = {
        "input_ids": ids,
        "multipliers": x.multipliers.numpy(),
        "vocab_sizes": x.moduli.numpy(),
        "past_ids": None,
        "head_offsets": x.offsets.numpy(),
    }
    reach = len(x.multipliers) - 1
    outputs = {
        "hash_ids": np.empty((*ids.shape, len(x.moduli)), np.int64),
        "present_ids": np.empty((len(ids), reach), np.int64),
    }
    session = onnx_session(
        "NGramHashMapping", inputs, outputs,
        pad_id=x.pad_id, n_head_per_ngram=len(x.moduli) // reach, max_ngram_size=reach + 1,
    )  # fmt: skip
    feed = {name: array for name, array in inputs.items() if array is not None}
    return {
        "ONNX Runtime NGramHashMapping": lambda: torch.from_numpy(
            session.run(["hash_ids"], feed)[0]
        )
    }


def numpy_hash(x: Hash) -> dict[str, Peer]:
    ids, multipliers, moduli, offsets = (
        t.numpy() for t in (x.token_ids, x.multipliers, x.moduli, x.offsets)
    )
    heads = len(moduli) // len(x.orders)

    def run():
        length, reach = ids.shape[1], len(multipliers) - 1
        padded = np.pad(ids, [(0, 0), (reach, 0)], constant_values=x.pad_id)
        mix, parts = ids * multipliers[0], []
        for j in range(1, reach + 1):
            mix = mix ^ (padded[:, reach - j : reach - j + length] * multipliers[j])
            mine = slice((j - 1) * heads, j * heads)
            parts.append(mix[..., None] % moduli[mine] + offsets[mine])
        return torch.from_numpy(np.concatenate(parts, -1))

    return {"NumPy": run}


HASH = onnx_hash, numpy_hash


def onnx_gate(hidden: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> dict[str, Peer]:
    if hidden.dtype == torch.bfloat16:
        raise Absent("ONNX Runtime EngramGate: no bf16 on a CPU")
    feed = {
        "key": k[None].numpy(),
        "query": hidden[None].numpy(),
        "value": v[None].numpy(),
        "key_norm_scale": weight.numpy(),
        "query_norm_scale": torch.ones_like(weight).numpy(),
    }
    session = onnx_session("EngramGate", feed, {"output": feed["key"]}, epsilon=1e-6)
    return {
        "ONNX Runtime EngramGate": lambda: torch.from_numpy(session.run(None, feed)[0].squeeze(0))
    }


def engram_gate(hidden: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The gate in plain torch, in float32 inside."""

    def normal(x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)

    d = (normal(hidden) * normal(k) * weight).sum(-1) * hidden.shape[-1] ** -0.5
    gate = (d.sign() * d.abs().clamp(min=1e-6).sqrt()).sigmoid()
    return (gate[..., None] * v[:, None].float()).to(hidden.dtype)


def lsh_codes(z: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scores in plain torch."""
    powers = 2 ** torch.arange(z.shape[-1] - 1, -1, -1, dtype=torch.int32, device=z.device)
    codes = ((z >= 0) * powers).sum(-1, dtype=torch.int32)
    size = z.abs()
    return codes, size.sum(-1) / (1 + (-2 * size).exp()).prod(-1)


def sparse_ffn(x: Tensor, up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The chosen neurons in plain torch: their rows gathered, and two products."""
    hidden = F.gelu((F.embedding(indices, up) @ x[..., None]).squeeze(-1)) * weights
    return (hidden[:, None] @ F.embedding(indices, down)).squeeze(1)


def compiled(function: Callable) -> Callable:
    """By torch.compile, for one shape."""
    torch.compiler.reset()
    torch._inductor.config.compile_threads = 1  # no idle workers beside the measurement
    return torch.compile(function, dynamic=False)
