"""An adapter whose source does not answer is waited for by its own requests alone."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server


@pytest.fixture
def silent_hub() -> Iterator[socket.socket]:
    """A hub that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_others_go_on_while_an_adapter_is_on_its_way(
    serve: Callable[..., Server],
    model_folder: Path,
    tmp_path: Path,
    silent_hub: socket.socket,
) -> None:
    model = tiny.make_model(tmp_path / "model", model_folder)
    tiny.make_adapter(tmp_path / "root" / "good", model)
    server = serve(
        environment={
            "HF_ENDPOINT": f"http://127.0.0.1:{silent_hub.getsockname()[1]}",
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "HF_HUB_ETAG_TIMEOUT": "120",
        },
        model_folder=model,
        adapter_root=tmp_path / "root",
        adapter_load_seconds=4,
    )
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(
            httpx.post,
            server.url + "/v1/completions",
            json={"model": "some/adapter", "prompt": "Hi", "adapter_source": "hub"},
            timeout=60,
        )
        connection, _ = silent_hub.accept()
        with connection:
            for adapter in (None, "good"):  # the second is itself loaded meanwhile
                assert len(server.token_ids("Hi", adapter, max_new_tokens=64)) == 64
            assert not waiting.done()
            reply = waiting.result()
    assert reply.status_code == 503
    assert "some/adapter" in reply.json()["error"]["message"]
