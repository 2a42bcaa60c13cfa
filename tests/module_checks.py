"""What the tests of modules do with them, whatever the module."""

from __future__ import annotations

import io

import torch
from torch import nn


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomise(module):
    """Gives all parameters random values: nothing is to be right because it is 0 or 1."""
    for seed, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    return module


def gradients(module, x, run):
    """The result of ``run(x)``, and the gradients of x and, by name, of the parameters."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = run(x)
    (out * draw(*out.shape, seed=9)).sum().backward()
    found = {name: p.grad.to_dense() for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **found}


def assert_alike(module, x, run, plain):
    """``run(x)`` is what ``plain(x)`` computes of the module's parameters, gradients included."""
    actual, expected = (gradients(module, x, function) for function in (run, plain))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def shapes(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def reloaded(module, fresh):
    """Fresh, with the state that a file has kept of module."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    return fresh


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
