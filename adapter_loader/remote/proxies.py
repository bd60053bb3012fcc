"""HTTP proxies, as the environment names them: https_proxy, http_proxy, all_proxy and no_proxy."""

import base64
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from adapter_loader.refusals import unavailable
from adapter_loader.remote.origins import DEFAULT_PORTS, Origin


class Proxy(NamedTuple):
    """Asked without TLS; what goes through it may have its own."""

    host: str
    port: int
    headers: dict[str, str]  # with a password, perhaps


def proxy_of(origin: Origin) -> Proxy | None:
    """Through whom to ask; None: directly. Raises RequestError for a proxy that we cannot ask."""
    proxies = getproxies()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or proxy_bypass(f"{origin.host}:{origin.port}", proxies):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise unavailable("the proxy that this server's environment names is none of http")
    headers = {}
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        encoded = base64.b64encode(secret.encode()).decode()
        headers["Proxy-Authorization"] = f"Basic {encoded}"
    return Proxy(parts.hostname, parts.port or DEFAULT_PORTS["http"], headers)
