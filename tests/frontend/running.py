"""A frontend as it runs, over a socket, with everything behind it faked."""

import asyncio
import socket
import threading
from typing import Any

from frontend.__main__ import Server, listen, server_config
from tests.frontend.fakes import Backend, settings


class Running:
    """A server in a thread of its own. Stop it."""

    def __init__(self, **changes: Any) -> None:
        self._changes = {"max_body_bytes": 10_000, **changes}
        listener = listen(settings(port=0))
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.backend: Backend
        self._server: Server
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listener),))
        self._made = threading.Event()
        self._thread.start()
        assert self._made.wait(10)

    async def _serve(self, listener: socket.socket) -> None:
        self.backend = Backend(**self._changes)
        self._server = Server(server_config(self.backend.app, self.backend.settings))
        self._made.set()
        await self._server.serve(sockets=[listener])

    @property
    def connections(self) -> int:
        """Those that are open now."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
