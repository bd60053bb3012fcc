"""Where adapters come from. A source finds an adapter's two files and opens them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from adapter_loader.ordinary_files import IDENTITY_OF_FILE, Identity, identity_of, open_file
from adapter_loader.refusals import invalid
from adapter_loader.texts import Texts
from pipeline.adapter_roots import CONFIG_FILE
from pipeline.messages import AdapterKey

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
PICKLE_ONLY = (
    f"has its weights only as {PICKLE_FILE}, which is not supported; convert them with: "
    "python -c 'import torch, safetensors.torch as s; "
    f's.save_file(torch.load("{PICKLE_FILE}", weights_only=True), "{WEIGHTS_FILE}")\''
)


class AdapterFiles(msgspec.Struct, frozen=True):
    """An adapter's config, read, and its weights, open, both as they were when opened.

    Whoever has it closes it, once. Two with the same identity have the same content.
    """

    config: bytes
    weights: int  # file descriptor
    weights_bytes: int
    identity: Identity  # of the config, then of the weights

    def has_changed(self) -> bool:
        """Whether somebody has written to the weights since they were opened."""
        return identity_of(os.fstat(self.weights)) != self.identity[-IDENTITY_OF_FILE:]

    def close(self) -> None:
        os.close(self.weights)


class Source(Protocol):
    """A kind of place that adapters come from."""

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """Find and open the adapter. May take long; called in a worker thread.

        Who may see the adapter is checked anew by each call. Raises RequestError.
        """
        ...

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """What lies beside the weights for tokenizers; None if its version is `known`.

        As `fetch` in all else, and refuses what that refuses before it reads the weights.
        """
        ...

    def lane(self, key: AdapterKey) -> str:
        """What this fetch shares threads with, and may wait for: its source, or one server of it.

        There are few: the server makes threads for each.
        """
        ...


def open_files(
    folder: Path, max_adapter_bytes: int, roots: Sequence[Path] | None = None
) -> AdapterFiles:
    """Open the adapter in `folder`; its files may be links. Raises RequestError.

    roots   resolved folders; a file that does not lie below one, after all links, is not found
    """
    config, config_status = open_file(folder / CONFIG_FILE, roots)
    try:
        data = _read_config(config, config_status.st_size)
    finally:
        os.close(config)
    try:
        weights, status = open_file(folder / WEIGHTS_FILE, roots)
    except FileNotFoundError as error:
        if (folder / PICKLE_FILE).exists():
            raise invalid(PICKLE_ONLY) from error
        raise invalid(f"has no {WEIGHTS_FILE}") from error
    if status.st_size > max_adapter_bytes:
        os.close(weights)
        raise too_large(status.st_size, max_adapter_bytes)
    identity = (*identity_of(config_status), *identity_of(status))
    return AdapterFiles(data, weights, status.st_size, identity)


def too_large(nbytes: int, max_adapter_bytes: int) -> Exception:
    return invalid(
        f"{WEIGHTS_FILE} has {nbytes} bytes, and this server takes at most {max_adapter_bytes}"
    )


def _read_config(descriptor: int, nbytes: int) -> bytes:
    if nbytes > MAX_CONFIG_BYTES:
        raise invalid(f"{CONFIG_FILE} has {nbytes} bytes, and {MAX_CONFIG_BYTES} is the most")
    return os.pread(descriptor, MAX_CONFIG_BYTES, 0)
