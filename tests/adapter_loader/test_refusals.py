"""What is refused, with which kind, and with a sentence that names what is wrong."""

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from adapter_loader.checkpoint import BaseModel
from adapter_loader.loading import fetch_and_check, fill, guarded, pack_checked
from adapter_loader.peft_config import HONOURED, REFUSED, WITHOUT_EFFECT
from adapter_loader.sources.local import LocalSource
from pipeline.messages import AdapterKey, Failure, FailureKind
from tests.adapter_loader.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    change_config,
    change_tensors,
    describe_base,
    entries_of,
    safetensors_bytes,
    tensor_name,
)

MAX_BYTES = 1 << 20
STATUS = {
    FailureKind.ADAPTER_NOT_FOUND: 404,
    FailureKind.ADAPTER_INVALID: 422,
    FailureKind.ADAPTER_UNAVAILABLE: 503,
}
A0 = tensor_name(0, "q_proj", "A")
B0 = tensor_name(0, "q_proj", "B")


def load(root: Path, base: BaseModel, name: str = "x", revision: str = "") -> str | Failure:
    key = AdapterKey("local", name, revision)
    source = LocalSource(roots=[root], max_adapter_bytes=MAX_BYTES)

    def job() -> str:
        checked = fetch_and_check(key, None, None, source, base)
        extent = memoryview(bytearray(checked.plan.placed.nbytes))  # type: ignore[union-attr]
        return pack_checked(checked, partial(fill, extent=extent))  # type: ignore[arg-type]

    return guarded(key, job)


def assert_refused(
    result: str | Failure, kind: FailureKind, words: tuple[str, ...], name: str = "x"
) -> None:
    assert isinstance(result, Failure), "it was loaded"
    assert (result.kind, result.status) == (kind, STATUS[kind])
    assert result.message.startswith(f"adapter {name}: ")
    assert "\n" not in result.message
    assert len(result.message) < 1000
    for word in words:
        assert word in result.message
    assert "/tmp" not in result.message, "it shows a path of the server"


class Config(NamedTuple):
    """A change to adapter_config.json, and what the sentence has to name."""

    changes: dict[str, object]
    words: tuple[str, ...]


CONFIGS = {
    "DoRA": Config({"use_dora": True}, ("use_dora",)),
    "a bias of no known kind": Config({"bias": "some"}, ("bias", "some")),
    "LoRA bias": Config({"lora_bias": True}, ("lora_bias",)),
    "saved modules": Config({"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head")),
    "trained tokens": Config({"trainable_token_indices": [1]}, ("trainable_token_indices",)),
    "parameters": Config({"target_parameters": ["experts.w1"]}, ("target_parameters",)),
    "megatron": Config({"megatron_config": {"tp": 2}}, ("megatron_config",)),
    "QALoRA": Config({"use_qalora": True}, ("use_qalora",)),
    "VeLoRA": Config({"velora_config": {"num_groups": 64}}, ("velora_config",)),
    "aLoRA": Config({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens",)),
    "MonteCLoRA": Config({"monteclora_config": {"x": 1}}, ("monteclora_config",)),
    "replicated layers": Config({"layer_replication": [[0, 2]]}, ("layer_replication",)),
    "BD-LoRA": Config({"use_bdlora": {"nblocks": 2}}, ("use_bdlora",)),
    "Arrow": Config({"arrow_config": {"top_k": 3}}, ("arrow_config",)),
    "KaSA": Config({"kasa_config": {"beta": 1}}, ("kasa_config",)),
    "an unknown key": Config({"use_next_year": 0.5}, ("use_next_year", "0.5")),
    "a very long unknown key": Config({"k" * 5000: "v" * 5000}, ("kkk", "vvv", "...")),
    "PiSSA": Config({"init_lora_weights": "pissa"}, ("pissa", "path_initial_model")),
    "fast PiSSA": Config({"init_lora_weights": "pissa_niter_16"}, ("pissa_niter_16",)),
    "OLoRA": Config({"init_lora_weights": "olora"}, ("olora",)),
    "CorDA": Config({"init_lora_weights": "corda"}, ("corda",)),
    "LoftQ": Config({"init_lora_weights": "loftq"}, ("loftq",)),
    "LoRA-GA": Config({"init_lora_weights": "lora_ga"}, ("lora_ga",)),
    "another kind of PEFT": Config({"peft_type": "IA3"}, ("IA3", "LORA")),
    "no kind of PEFT": Config({"peft_type": None}, ("peft_type",)),
    "a classifier": Config({"task_type": "SEQ_CLS"}, ("task_type", "SEQ_CLS")),
    "rank 0": Config({"r": 0}, ("r",)),
    "rank 513": Config({"r": 513}, ("512",)),
    "a rank that is text": Config({"r": "8"}, ("$.r", "int")),
    "a rank that is true": Config({"r": True}, ("$.r", "bool")),
    "rank 0 in a pattern": Config({"rank_pattern": {"q_proj": 0}}, ("rank_pattern",)),
    "rank_pattern as a list": Config({"rank_pattern": ["q_proj"]}, ("rank_pattern",)),
    "alpha as text": Config({"lora_alpha": "16"}, ("lora_alpha",)),
    "an alpha too large": Config({"lora_alpha": 10**400}, ("lora_alpha",)),
    "rsLoRA as text": Config({"use_rslora": "yes"}, ("use_rslora",)),
    "a key that is no pattern": Config({"rank_pattern": {"(q_proj": 4}}, ("rank_pattern", "(q_")),
    "a pattern that takes for ever": Config(
        {"alpha_pattern": {r"(.*.*)*\1(\w+\w+)+#": 4}}, ("alpha_pattern", "too long")
    ),
    "another rank than the tensors": Config({"r": 8}, ("lora_A", "rank 4", "8")),
    "another rank for one module": Config({"rank_pattern": {"0.mlp.up_proj": 5}}, ("up_proj", "5")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_refused(
    case: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    changes, words = CONFIGS[case]
    change_config(copy_of("x"), **changes)
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, words)


def test_every_key_of_the_installed_peft_is_in_the_table_of_the_docs() -> None:
    made_of = {"honoured": HONOURED, "without effect": WITHOUT_EFFECT, "refused": REFUSED.keys()}
    lines = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| `")]
    for what, keys in made_of.items():
        rows = [row[1].strip(" `") for row in cells if row[2].strip() == what]
        assert rows == sorted(keys)
    installed = {field.name for field in dataclasses.fields(LoraConfig)}
    assert installed <= HONOURED | WITHOUT_EFFECT | REFUSED.keys()


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_is_refused_with_its_reason(
    key: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    change_config(copy_of("x"), **{key: [1]})
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, (key, REFUSED[key]))


class Texts(NamedTuple):
    """Bytes in place of adapter_config.json."""

    content: bytes
    words: tuple[str, ...]


TEXTS = {
    "empty": Texts(b"", ("not a JSON object",)),
    "not JSON": Texts(b"r: 8", ("not a JSON object",)),
    "a list": Texts(b"[]", ("not a JSON object",)),
    "not UTF-8": Texts(b'{"r": "\xff"}', ("not a JSON object",)),
    "deeply nested": Texts(b'{"r":' * 100_000, ("not a JSON object",)),
    "too large": Texts(b" " * ((1 << 20) + 1), (CONFIG, "1048577")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_file_is_refused(
    case: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    content, words = TEXTS[case]
    (copy_of("x") / CONFIG).write_bytes(content)
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, words)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensors[key] for key in tensors if key != name}


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 1] = value

    return change


def replaced(name: str, by: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {by if key == name else key: value for key, value in tensors.items()}


class Tensors(NamedTuple):
    """A change to the tensors."""

    change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
    words: tuple[str, ...]


X = torch.zeros(4, 4)
TENSORS = {
    "A without B": Tensors(drop(B0), ("model.layers.0.self_attn.q_proj", "no lora_B")),
    "B without A": Tensors(drop(A0), ("model.layers.0.self_attn.q_proj", "no lora_A")),
    "no tensor at all": Tensors(lambda _: {}, ("no LoRA weights",)),
    "NaN": Tensors(spoil(A0, float("nan")), (A0, "not finite")),
    "infinity": Tensors(spoil(B0, float("-inf")), (B0, "not finite")),
    "overflow by the scaling": Tensors(spoil(B0, 3e38), (B0, "too large for float32")),
    "a wrong width": Tensors(
        put(A0, torch.zeros(4, 48)), ("another base model", A0, "[4, 48]", "[4, 64]")
    ),
    "a wrong height": Tensors(
        put(B0, torch.zeros(80, 4)), ("another base model", B0, "[80, 4]", "[96, 4]")
    ),
    "another rank in A": Tensors(put(A0, torch.zeros(5, 64)), (A0, "rank 5", "says 4")),
    "another rank in B": Tensors(put(B0, torch.zeros(96, 5)), (B0, "rank 5", "says 4")),
    "rank 0 in A": Tensors(put(A0, torch.zeros(0, 64)), (A0, "rank 0")),
    "three dimensions": Tensors(put(A0, torch.zeros(4, 64, 1)), (A0, "[4, 64, 1]")),
    "no dimension": Tensors(put(A0, torch.tensor(1.0)), (A0, "[]")),
    "fp64": Tensors(put(A0, torch.zeros(4, 64).double()), (A0, "F64", "BF16")),
    "fp8": Tensors(put(A0, torch.zeros(4, 64).to(torch.float8_e4m3fn)), (A0, "F8_E4M3")),
    "int8": Tensors(put(A0, torch.zeros(4, 64, dtype=torch.int8)), (A0, "I8")),
    "a layer too many": Tensors(put(tensor_name(3, "q_proj", "A"), X), ("layer 3", "3 layers")),
    "a layer far out": Tensors(put(tensor_name(10**9, "q_proj", "A"), X), ("not a LoRA weight",)),
    "a layer with a zero in front": Tensors(replaced(A0, A0.replace("s.0.", "s.00.")), (".00.",)),
    "the same tensor twice": Tensors(
        put(tensor_name(0, "q_proj", "A", ".default"), X), ("are one",)
    ),
    "two adapters": Tensors(put(tensor_name(0, "q_proj", "A", ".other"), X), (".other.",)),
    "a module in the wrong block": Tensors(put(A0.replace("self_attn", "mlp"), X), ("mlp.q_proj",)),
    "an unknown module": Tensors(put(A0.replace("q_proj", "qkv_proj"), X), ("qkv_proj",)),
    "no prefix": Tensors(put(A0.removeprefix(PREFIX), X), ("not a LoRA weight",)),
    "more behind the name": Tensors(put(A0 + "\n", X), ("not a LoRA weight", "\\n")),
    "another prefix": Tensors(put(A0.replace("model.layers", "layers", 1), X), ("layers.0",)),
    "a DoRA magnitude": Tensors(
        put(A0.replace("lora_A.weight", "lora_magnitude_vector"), X), ("DoRA",)
    ),
    "an embedding": Tensors(
        put(f"{PREFIX}model.embed_tokens.lora_embedding_A", X), ("embed_tokens", "embeddings")
    ),
    "a saved embedding": Tensors(put(f"{PREFIX}model.embed_tokens.weight", X), ("embeddings",)),
    "the output layer": Tensors(put(f"{PREFIX}lm_head.lora_A.weight", X), ("output layer",)),
    "a bias": Tensors(put(B0.replace("weight", "bias"), X), ("bias",)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_refused(
    case: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    change, words = TENSORS[case]
    change_tensors(copy_of("x"), change)
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, words)


def test_a_value_too_large_for_the_compute_dtype_is_refused(
    copy_of: Callable[[str], Path], root: Path, tmp_path: Path
) -> None:
    change_tensors(copy_of("x"), spoil(A0, 70_000.0))
    base = describe_base(tmp_path, "float16")
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, (A0, "too large for float16"))


@pytest.mark.parametrize(
    ("hidden", "layers", "words"),
    [
        (32, 3, ("another base model", "'some/model'", "[4, 64]", "[4, 32]")),
        (64, 2, ("another base model", "layer 2", "2 layers")),
    ],
)
def test_an_adapter_for_another_base_is_refused(
    hidden: int,
    layers: int,
    words: tuple[str, ...],
    copy_of: Callable[[str], Path],
    root: Path,
    tmp_path: Path,
) -> None:
    change_config(copy_of("x"), base_model_name_or_path="some/model")
    base = describe_base(tmp_path, hidden=hidden, layers=layers)
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, words)


class Content(NamedTuple):
    """Bytes in place of the safetensors file, given the good ones."""

    content: Callable[[bytes], bytes]
    words: tuple[str, ...]


def entry(start: Any, end: Any, shape: Any = (4, 64), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: object, nbytes: int = 0) -> Callable[[bytes], bytes]:
    return lambda _: safetensors_bytes(header, bytes(nbytes))


CONTENTS = {
    "empty": Content(lambda _: b"", ("truncated",)),
    "no more than a length": Content(lambda good: good[:8], ("truncated",)),
    "cut in the header": Content(lambda good: good[:100], ("truncated",)),
    "cut in the tensors": Content(lambda good: good[:-1], ("truncated", "header speaks")),
    "more behind": Content(lambda good: good + b"\0", ("damaged",)),
    "a pickle": Content(lambda _: b"\x80\x02}q\x00." * 99, ("not a safetensors file",)),
    "a header too large": Content(
        lambda _: (17 << 20).to_bytes(8, "little") + bytes(500), ("truncated",)
    ),
    "a length beyond all": Content(lambda _: b"\xff" * 8 + bytes(500), ("truncated",)),
    "a header that is a list": Content(file_of([]), ("bad header",)),
    "a header that is not JSON": Content(file_of(b"{"), ("bad header",)),
    "a header that is not UTF-8": Content(file_of(b'{"\xff": 1}'), ("bad header",)),
    "a header nested deeply": Content(file_of(b'{"a":' * 90_000), ("bad header",)),
    "an entry nested deeply": Content(file_of(b'{"a":' + b"[" * 90_000), ("bad header",)),
    "an entry that is text": Content(file_of({A0: "here"}), ("bad header",)),
    "an entry with more": Content(file_of({A0: {**entry(0, 0), "more": 1}}), ("bad header",)),
    "a shape of text": Content(file_of({A0: entry(0, 4, ["4"])}), ("bad header",)),
    "a negative size": Content(file_of({A0: entry(0, 4, [-1])}), ("bad header",)),
    "a size beyond all": Content(file_of({A0: entry(0, 4, [10**30])}), ("bad header",)),
    "sizes whose product is beyond all": Content(
        file_of({A0: entry(0, 4, [1 << 60] * 8)}), ("offsets", "shape")
    ),
    "a hundred dimensions": Content(file_of({A0: entry(0, 4, [1] * 100)}), ("bad header",)),
    "an end before its start": Content(file_of({A0: entry(8, 4, [1])}, 8), ("offsets", A0)),
    "an end that does not fit": Content(file_of({A0: entry(0, 8, [1])}, 8), ("offsets", A0)),
    "an offset beyond the file": Content(file_of({A0: entry(9000, 9004, [1])}, 4), ("gap",)),
    "an overlap": Content(
        file_of({A0: entry(0, 8, [2]), B0: entry(4, 8, [1])}, 8), ("overlap", B0)
    ),
    "a gap": Content(file_of({A0: entry(0, 4, [1]), B0: entry(8, 12, [1])}, 12), ("gap", B0)),
    "three offsets": Content(
        file_of({A0: {**entry(0, 0), "data_offsets": [0, 1, 2]}}), ("bad header",)
    ),
    "a file of metadata alone": Content(
        file_of({"__metadata__": {"a": "b"}}), ("no LoRA weights",)
    ),
    "a very long name": Content(
        file_of(entries_of([("n" * 50_000, "F32", [1], 4)]), 4), ("nnn", "...")
    ),
    "a file too large": Content(lambda good: good + bytes(MAX_BYTES), (WEIGHTS, "at most 1048576")),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_weight_file_is_refused(
    case: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    content, words = CONTENTS[case]
    weights = copy_of("x") / WEIGHTS
    weights.write_bytes(content(weights.read_bytes()))
    assert_refused(load(root, base), FailureKind.ADAPTER_INVALID, words)


def test_a_header_beyond_the_bound_is_refused_without_being_read(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    header = b"{}" + b" " * (16 << 20)
    (copy_of("x") / WEIGHTS).write_bytes(safetensors_bytes(header))
    key = AdapterKey("local", "x")
    source = LocalSource(roots=[root], max_adapter_bytes=1 << 30)
    result = guarded(key, lambda: fetch_and_check(key, None, None, source, base))
    assert isinstance(result, Failure)
    assert "header of 16777218 bytes" in result.message


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def weights_as_fifo(folder: Path) -> None:
    lose_weights(folder)
    os.mkfifo(folder / WEIGHTS)


def weights_as_folder(folder: Path) -> None:
    lose_weights(folder)
    (folder / WEIGHTS).mkdir()


def weights_as_socket(folder: Path) -> None:
    lose_weights(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        at = os.open(folder, os.O_DIRECTORY)
        bound.bind(f"/proc/self/fd/{at}/{WEIGHTS}")  # the whole path may be too long
        os.close(at)


def weights_in_a_loop(folder: Path) -> None:
    lose_weights(folder)
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def weights_as_device(folder: Path) -> None:
    lose_weights(folder)
    (folder / WEIGHTS).symlink_to("/dev/zero")


def weights_outside(folder: Path) -> None:
    outside = folder.parent.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def config_outside(folder: Path) -> None:
    outside = folder.parent.parent / "outside.json"
    (folder / CONFIG).rename(outside)
    (folder / CONFIG).symlink_to(outside)


def lose_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def config_as_fifo(folder: Path) -> None:
    lose_config(folder)
    os.mkfifo(folder / CONFIG)


NOT_FOUND, INVALID = FailureKind.ADAPTER_NOT_FOUND, FailureKind.ADAPTER_INVALID
FOLDERS: dict[str, tuple[Callable[[Path], None], FailureKind, tuple[str, ...]]] = {
    "no weights": (lose_weights, INVALID, ("has no adapter_model.safetensors",)),
    "weights as .bin": (only_pickle, INVALID, ("adapter_model.bin", "torch.load", "save_file")),
    "a FIFO": (weights_as_fifo, INVALID, (WEIGHTS, "not an ordinary file")),
    "a folder": (weights_as_folder, INVALID, (WEIGHTS, "not an ordinary file")),
    "a socket": (weights_as_socket, INVALID, (WEIGHTS, "cannot be opened")),
    "a loop of links": (weights_in_a_loop, INVALID, (WEIGHTS, "cannot be opened")),
    "a device": (weights_as_device, INVALID, (WEIGHTS, "not an ordinary file")),
    "weights outside the root": (weights_outside, NOT_FOUND, (WEIGHTS, "outside")),
    "config outside the root": (config_outside, NOT_FOUND, (CONFIG, "outside")),
    "no config": (lose_config, NOT_FOUND, ("no such adapter",)),
    "a config that is a FIFO": (config_as_fifo, NOT_FOUND, ("no such adapter",)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_refused(
    case: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    change, kind, words = FOLDERS[case]
    change(copy_of("x"))
    assert_refused(load(root, base), kind, words)


@pytest.mark.parametrize(
    "name",
    ["missing", "..", "../outside", "/etc", "x/..", "link", "x\0", "", ".", "x\n", "a" * 999],
)
def test_an_id_that_is_no_folder_below_the_root_is_not_found(
    name: str, copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    copy_of("../outside")
    (root / "link").symlink_to(root.parent / "outside")
    result = load(root, base, name)
    assert isinstance(result, Failure)
    assert (result.kind, result.status) == (NOT_FOUND, 404)


def test_a_local_adapter_has_no_revision(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    copy_of("x")
    assert_refused(load(root, base, revision="main"), NOT_FOUND, ("no such adapter",))


def test_links_below_the_root_are_followed(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    folder = copy_of("x")
    (folder / WEIGHTS).rename(root / "blob")
    (folder / WEIGHTS).symlink_to("../blob")
    assert isinstance(load(root, base), str)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    weights = copy_of("x") / WEIGHTS
    key = AdapterKey("local", "x")
    source = LocalSource(roots=[root], max_adapter_bytes=MAX_BYTES)
    for nbytes in (weights.stat().st_size, 3000):  # written in place; cut short
        checked = fetch_and_check(key, None, None, source, base)
        with weights.open("r+b") as file:
            file.truncate(nbytes)
            os.utime(file.fileno(), (1, 1))
        extent = memoryview(bytearray(checked.plan.placed.nbytes))  # type: ignore[union-attr]
        into = partial(fill, extent=extent)
        result = guarded(key, lambda: pack_checked(checked, into))  # type: ignore[arg-type]  # noqa: B023
        assert_refused(result, FailureKind.ADAPTER_UNAVAILABLE, ("changed while",))


def test_refused_adapters_leave_no_file_open(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    for index, change in enumerate((only_pickle, weights_as_fifo, weights_outside, config_outside)):
        change(copy_of(str(index)))
    change_config(copy_of("4"), use_dora=True)
    change_tensors(copy_of("5"), spoil(A0, float("nan")))
    (copy_of("6") / WEIGHTS).write_bytes(b"")
    copy_of("7")
    before = os.listdir("/proc/self/fd")
    failures = [load(root, base, str(index)) for index in range(8)]
    assert os.listdir("/proc/self/fd") == before
    assert [isinstance(failure, Failure) for failure in failures] == [True] * 7 + [False]


def test_the_config_may_be_written_by_any_json_library(
    copy_of: Callable[[str], Path], root: Path, base: BaseModel
) -> None:
    folder = copy_of("x")
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_bytes(b"\n " + json.dumps(values, indent=7).encode() + b"\n\n")
    assert isinstance(load(root, base), str)
