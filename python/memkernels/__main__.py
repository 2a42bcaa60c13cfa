"""``python -m memkernels info`` and ``python -m memkernels demo``."""

from __future__ import annotations

import argparse
import ctypes
import platform

import torch

import memkernels
from memkernels import _C, _library, fallback


def cuda_driver() -> str:
    """The CUDA version the installed driver supports."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver"
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "a driver that does not answer"
    return f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def info() -> None:
    build = _C.build_info()
    runtime = f"runtime {build['cuda']}" if build["cuda"] else f"none, {build['cuda_reason']}"
    facts = {
        "memkernels": f"{memkernels.__version__} ({build['build_type']}, {build['compiler']})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "python": platform.python_version(),
        "CPU kernels": f"{_C.cpu_isa()}, of {', '.join(_C.cpu_isas())}",
        "threads": torch.get_num_threads(),
        "CUDA": f"{runtime}; {cuda_driver()}",
    }
    for name, fact in facts.items():
        print(f"{name:<12} {fact}")

    print(f"\n{'op':<24}{'CPU':<10}CUDA")
    for op in fallback.__all__:  # has every op
        native = [_library.has_kernel(op, device) for device in ("cpu", "cuda")]
        print(f"{op:<24}" + "".join(f"{'native' if has else 'fallback':<10}" for has in native))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m memkernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets, and the backends of each op")
    demo = commands.add_parser("demo", help="the ops in numbers, then a model trained and served")
    demo.add_argument("--quick", action="store_true", help="everything, but smaller")
    demo.add_argument("--out", default="memkernels_demo.png", metavar="PNG", help="the figure")
    args = parser.parse_args()
    if args.command == "info":
        info()
    else:
        from memkernels.demo import main as run_demo

        run_demo(args.quick, args.out)


if __name__ == "__main__":
    main()
