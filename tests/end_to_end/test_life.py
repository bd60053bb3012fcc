"""Start, drain, end; and a start after everything was killed."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually

PROCESSES = {"frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader"}


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model", model_folder)


@pytest.fixture(scope="module")
def root(model: Path) -> Path:
    tiny.make_adapter(model.parent / "root" / "good", model, 1)
    return model.parent / "root"


def test_sigterm_drains(serve: Callable[..., Server], model: Path, root: Path) -> None:
    server = serve(model_folder=model, adapter_root=root)
    body = {
        "model": "good",
        "prompt": "Hi",
        "max_tokens": 500,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }

    everybody_streams = threading.Barrier(8, timeout=60)

    def stream(_number: int) -> int:
        """The tokens that the last chunk speaks of."""
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply:
            events = []
            for line in reply.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                if len(events) == 1 and everybody_streams.wait() == 0:
                    server.terminate()
        assert events[-1] == "[DONE]"
        return int(json.loads(events[-2])["usage"]["completion_tokens"])

    with ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(stream, number) for number in range(8)]
        assert eventually(lambda: httpx.get(server.url + "/health").status_code == 503) or all(
            done.done() for done in streams
        )
        counts = [running.result() for running in streams]
    server.wait()
    assert all(count == 500 for count in counts)
    assert server.exit_codes() == dict.fromkeys(PROCESSES, 0), server.output()
    assert server.leftovers() == []


def test_new_requests_get_503_while_running_ones_end(
    serve: Callable[..., Server], model: Path, root: Path
) -> None:
    server = serve(model_folder=model, adapter_root=root)
    body = {"model": "", "prompt": "Hi", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.terminate()
        assert eventually(lambda: "SIGTERM received" in server.output(), seconds=5), server.output()
        refused: list[int] = []
        for _ in lines:
            if not refused:
                late = httpx.post(
                    server.url + "/v1/completions", json={**body, "stream": False}, timeout=60
                )
                refused.append(late.status_code)
    server.wait()
    assert refused == [503]


def test_a_start_after_everything_was_killed_works(
    serve: Callable[..., Server], model: Path, root: Path
) -> None:
    killed = serve(model_folder=model, adapter_root=root)
    first = killed.token_ids("Hi", "good", max_new_tokens=8)
    killed.kill_everything()
    assert killed.leftovers() != []  # else there would be nothing to clean up
    again = serve(model_folder=model, adapter_root=root, port=killed.port, run_dir=killed.run_dir)
    assert again.token_ids("Hi", "good", max_new_tokens=8) == first
    again.stop()
    assert killed.leftovers() == []


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--model-id=/nowhere/at/all", "model_id"),
        ("--adapter-root=/nowhere/at/all", "adapter_root"),
        ("--arena-bytes=999999999999999", "arena_bytes"),
        ("--rows=zero", "rows"),
    ],
)
def test_what_cannot_work_is_one_sentence_at_the_start(
    run_serve: Callable[..., tuple[int, str]], flag: str, says: str
) -> None:
    code, output = run_serve(flag)
    assert code == 2
    assert says in output
    assert "Traceback" not in output


def test_a_port_in_use_is_one_sentence(
    serve: Callable[..., Server], run_serve: Callable[..., tuple[int, str]], model: Path
) -> None:
    server = serve(model_folder=model)
    code, output = run_serve(f"--port={server.port}", f"--model-folder={model}")
    assert code == 2
    assert "port: cannot listen" in output
