"""Options, profiles and the backends under test."""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    # More threads than cores must not spin while they wait. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

import checks
import cuda_ops
import memkernels
from memkernels import fallback

for name, max_examples in ("quick", 50), ("full", 1000):
    hypothesis.settings.register_profile(
        name, max_examples=max_examples, derandomize=True, deadline=None, database=None
    )


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the wide sweeps")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a wide sweep, run with --full")
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "quick")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a wide sweep: --full"))


def backend(name):
    """A backend with one signature: what it returns is always everything."""
    if name == "fallback":
        return fallback
    if name == "cuda":
        return cuda_ops.namespace()
    everything = {
        name: functools.partial(getattr(memkernels, name), return_lse=True)
        for name in ("paged_attention", "gather_attention")
    }
    public = {name: getattr(memkernels, name) for name in memkernels.__all__}
    return SimpleNamespace(**public | everything)


@pytest.fixture(scope="session", params=["native", "fallback", "cuda"])
def ops(request):
    return backend(request.param)


@pytest.fixture(scope="session", params=["native", "cuda"])
def kernels(request):
    """The backends with kernels of their own."""
    return backend(request.param)


@pytest.fixture(scope="session", params=["native", "fallback", "cuda"])
def scan_ops(request):
    """The backends of the scan family, whose fallback begins with the signature."""
    return checks.PLAIN if request.param == "fallback" else backend(request.param)


@pytest.fixture
def num_threads():
    """Sets torch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
