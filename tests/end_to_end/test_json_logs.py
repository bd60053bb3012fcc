"""With log_format=json, what the processes log is an object a line that a collector can read."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end import tiny
from tests.end_to_end.server import Server


def test_every_event_of_every_process_is_an_object_on_a_line_of_its_own(
    serve: Callable[..., Server], model_folder: Path, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "model", model_folder)
    tiny.make_adapter(tmp_path / "root" / "good", model)
    server = serve(model_folder=model, adapter_root=tmp_path / "root", log_format="json")
    server.token_ids("Hi", "good", max_new_tokens=2)
    server.stop()
    events = [json.loads(line) for line in server.lines if line.startswith("{")]
    told = {(event["process"], event["event"]) for event in events}
    assert told >= {
        ("scheduler", "ready"),
        ("gpu_worker", "worker_ready"),
        ("adapter_loader", "adapter_staged"),
        ("frontend", "draining"),
        ("tokenizer_workers", "stopped"),
    }
    (staged,) = [event for event in events if event["event"] == "adapter_staged"]
    assert staged["adapter"] == "good"
    assert isinstance(staged["bytes"], int)
    others = [line for line in server.lines if not line.startswith("{")]
    assert not [line for line in others if "event=" in line or "{" in line.split(" - try")[0]]
