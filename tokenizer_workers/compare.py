"""`python -m tokenizer_workers.compare FOLDER`: is the tokenizer.json on stdin that of the folder?

It is somebody else's, so that a process without secrets in its environment, with little memory and
time, reads it. Says on stdout how it differs, as the end of a sentence; nothing if it agrees.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.parent import die_with_parent
from tokenizer_workers.agreement import canonical, difference
from tokenizer_workers.loading import base_tokenizers

ROOT = Path(__file__).parent.parent  # where this package lies
SECONDS = 60  # of a processor: twenty times what a vocabulary of 256,000 takes
WALL_SECONDS = 300.0  # on a machine that is busy
MEMORY_BYTES = 4 << 30
UNREADABLE = "it cannot be read"


def compare(folder: Path, tokenizer: bytes) -> str:
    """How a tokenizer.json differs from the base model's; empty if it agrees. Takes a while."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tokenizer_workers.compare", str(folder)],
            input=tokenizer,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic of the library may have text in it
            env={"PYTHONPATH": str(ROOT)},
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return UNREADABLE
    return done.stdout.decode() if done.returncode == 0 else UNREADABLE


def main(folder: Path) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = sys.stdin.buffer.read()
    try:
        read = Tokenizer.from_str(own.decode())
    except Exception as error:  # it raises nothing more precise
        print(f"{UNREADABLE} ({str(error)[:200]})", end="")
        return
    differences = [difference(canonical(read), canonical(base)) for base in base_tokenizers(folder)]
    print("" if "" in differences else differences[-1], end="")


if __name__ == "__main__":
    os.nice(5)  # others make text meanwhile
    main(Path(sys.argv[1]))
