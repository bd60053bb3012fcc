"""What stands beside every figure: the machine and the commit."""

import os
import platform
import subprocess
from pathlib import Path


def machine() -> str:
    """Processor, cores that this process may use, and Python."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}"


def commit() -> str:
    """The short hash, with a + when the tree has changes that are not committed."""
    root = Path(__file__).parent.parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"
