"""What keeps files and memory of the server from other users of the machine, and from clients."""

import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import ConfigError

PRIVATE = 0o077  # of a mask: nobody but the owner
NO_CORE_BYTES = 1  # less than any core; with 0 the kernel still hands one to a program, core(5)


def keep_private() -> None:
    """From now on, in this process and those it starts: what is written is readable by the
    server's user alone, and no core is dumped, which would hold prompts and secrets."""
    os.umask(PRIVATE)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    most = NO_CORE_BYTES if hard == resource.RLIM_INFINITY else min(NO_CORE_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (most, hard))


def check_roots(roots: Iterable[Path], cache: str, environment: Mapping[str, str]) -> None:
    """Any client may have what lies below an adapter root. Raises ConfigError if that is all of
    the machine, or adapters that were downloaded for those who showed a token.

    cache        the setting
    environment  says where caches lie
    """
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HOME") or f"{home}/huggingface"
    downloads = _resolved(f"{cache or f'{home}/loradex'}/downloads")
    of_hub = _resolved(environment.get("HF_HUB_CACHE") or f"{hub}/hub")
    for root in roots:
        if root == Path(root.anchor):
            raise ConfigError(f"adapter_root: {root} is all of this machine; name a folder")
        if downloads.is_relative_to(root) or root.is_relative_to(downloads):
            raise ConfigError(
                f"adapter_root: {root} has {downloads} in it, or lies there, "
                "where adapters are that others need a token for"
            )
        if of_hub.is_relative_to(root):
            raise ConfigError(
                f"adapter_root: {root} has all that was downloaded from the hub in it ({of_hub})"
            )


def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()
