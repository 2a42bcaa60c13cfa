"""Shows the ABI promise: ``python tests/abi.py 2.10.0 2.14.1``.

Builds one wheel, then installs it, not rebuilt, beside each of the given torch versions in an
environment of its own, and runs the tests there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(versions: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT]
        subprocess.run(pip_wheel, check=True)
        (wheel,) = wheels.glob("memkernels-*.whl")
        for version in versions:
            place = Path(folder) / version
            venv.create(place, with_pip=True)
            python = place / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}"], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[test]"], check=True)
            pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests"]
            run = subprocess.run(pytest, cwd=folder, capture_output=True, text=True)
            failed += run.returncode != 0
            print(f"torch {version}: {run.stdout.strip().splitlines()[-1]}", flush=True)
            if run.returncode:
                print(run.stdout[-4000:])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
