"""Optimisers of tables that change only the rows which have been read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

import memkernels
from memkernels.nn.tables import empty_table


class _RowOptimizer(Optimizer):
    """Steps of the rows in sparse gradients."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [
            (group, index, param)
            for group in self.param_groups
            for index, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for group, index, param in due:
            if param.grad.layout != torch.sparse_coo:
                names = group.get("param_names")
                name = names[index] if names else f"{index} of its group, {list(param.shape)},"
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of parameter {name} is dense; "
                    "make it sparse (sparse=True) or use the optimiser of torch"
                )
        for group, _, param in due:
            self._step(group, param, self.state[param], *_rows(param))
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch has given the state the dtype of its parameter.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device)

    def _step(self, group, param, state, rows, grads, count) -> None:
        raise NotImplementedError


class RowSGD(_RowOptimizer):
    """SGD on the rows of tables that have a gradient, by `memkernels.row_sgd`.

    As ``torch.optim.SGD`` without momentum; weight decay too is of those rows alone. Takes sparse
    gradients, as `memkernels.embedding_bag` and modules make them with ``sparse=True``; if layers
    share a table, their gradients are added up in float32. RuntimeError, before any step, if a
    gradient is dense::

        memory = ProductKeyMemory(512, sparse=True)
        table = RowSGD([memory.values], lr=0.1)
        memory(x).sum().backward()
        table.step()

    Args:
        params: ``[N, D]`` tables, or groups of them.
        lr, weight_decay: of groups that do not have their own.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, *, weight_decay: float = 0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _step(self, group, param, state, rows, grads, count):
        options = {name: group[name] for name in ("lr", "weight_decay")}
        memkernels.row_sgd(param, rows, grads, count, **options)


class RowAdagrad(_RowOptimizer):
    """Adagrad (Duchi et al., 2011) on the rows of tables that have a gradient, by
    `memkernels.row_adagrad`.

    As ``torch.optim.Adagrad`` without decay of any kind. Gradients as in `RowSGD`. A table gets
    its state, ``sum``, float32 (float64 for float64), with its first gradient.

    Args:
        params: as in `RowSGD`.
        lr, eps: of groups that do not have their own.
        rowwise: keep one accumulator a row, the mean of its squares, ``[N]`` instead of ``[N, D]``.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-2, *, eps: float = 1e-10, rowwise: bool = False
    ):
        super().__init__(params, {"lr": lr, "eps": eps, "rowwise": rowwise})

    def _step(self, group, param, state, rows, grads, count):
        if not state:
            shape = param.shape[:1] if group["rowwise"] else param.shape
            state["sum"] = empty_table(*shape, dtype=grads.dtype, device=param.device).zero_()
        options = {name: group[name] for name in ("lr", "eps")}
        memkernels.row_adagrad(param, state["sum"], rows, grads, count, **options)


class RowAdam(_RowOptimizer):
    """Adam (Kingma and Ba, 2015) on the rows of tables that have a gradient, by
    `memkernels.row_adam`.

    As ``torch.optim.AdamW``, decoupled weight decay included, but of those rows alone, as
    ``torch.optim.SparseAdam``: moments of other rows do not decay, and the bias correction is that
    of the table's steps, however often a row was among them. Gradients as in `RowSGD`. A table
    gets its state, ``step``, ``exp_avg`` and ``exp_avg_sq``, with its first gradient.

    Args:
        params: as in `RowSGD`.
        lr, betas, eps, weight_decay: of groups that do not have their own.
        state_dtype: of the moments: float32 or the dtype of the table (float64 for float64); None:
            float32.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        state_dtype: torch.dtype | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "state_dtype": state_dtype})

    def _step(self, group, param, state, rows, grads, count):
        if not state:
            dtype = group["state_dtype"] or grads.dtype
            state["step"] = 0
            for name in "exp_avg", "exp_avg_sq":
                state[name] = empty_table(*param.shape, dtype=dtype, device=param.device).zero_()
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        moments = state["exp_avg"], state["exp_avg_sq"]
        step = state["step"] + 1
        memkernels.row_adam(param, *moments, rows, grads, count, step=step, **options)
        state["step"] = step


def _rows(param: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a sparse gradient, different ones, their gradients in float32 (float64 for
    float64), and their count."""
    rows, grads = param.grad._indices()[0], param.grad._values()
    # Autograd forgets that a gradient was coalesced.
    if not param.grad.is_coalesced() and (rows[1:] <= rows[:-1]).any():
        return memkernels.embedding_bag_backward(grads, rows[:, None], len(param))
    count = torch.tensor([len(rows)], device=rows.device)
    return rows, grads.to(torch.promote_types(grads.dtype, torch.float32)), count
