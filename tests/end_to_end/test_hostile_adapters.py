"""Adapters made to break the server: each is one sentence and one more in the counter, in little
memory and time, and nobody else notices."""

import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.adapter_loader.adapters import safetensors_bytes, tensor_name
from tests.adapter_loader.web_server import Served, WebServer, web_server
from tests.end_to_end import tiny
from tests.end_to_end.server import Server, eventually

CONFIG, WEIGHTS = "adapter_config.json", tiny.WEIGHTS
MAX_BYTES = 64 << 20  # of an adapter's weights
PEAK_BYTES = 160 << 20  # that one adapter may add to a process of the loader for a moment
SECONDS = 20.0
LOADS = "loradex_adapter_loads_total"
A0 = tensor_name(0, "q_proj", "A")
B0 = tensor_name(0, "q_proj", "B")


class Place(NamedTuple):
    server: Server
    root: Path
    web: WebServer


@pytest.fixture(scope="module")
def place(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny.make_model(folder / "model", model_folder)
    root = folder / "root"
    tiny.change_config(
        tiny.make_adapter(root / "good", model, 1), base_model_name_or_path="some/base"
    )
    with web_server() as web:
        server = serve(
            environment={"HF_HUB_OFFLINE": "1"},
            model_folder=model,
            adapter_root=root,
            default_adapter_source="local",
            dtype="float32",
            http_host=web.url,
            cache=folder / "cache",
            max_adapter_bytes=MAX_BYTES,
            stats_seconds=0.1,
            adapter_revalidate_seconds=1e6,  # else `good` is loaded again, and counted
        )
        server.token_ids("Hi", "good", max_new_tokens=1)
        assert eventually(lambda: LOADS in httpx.get(f"{server.url}/metrics").text)
        yield Place(server, root, web)


def entry(shape: list[int], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_header(header: object, nbytes: int = 0) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(safetensors_bytes(header, bytes(nbytes)))

    return spoil


def many_tensors(count: int, limit: int | None = None) -> bytes:
    """A header of tensors without elements."""
    one = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(one % number for number in range(count))
    if limit is not None:
        text = text[: text.rindex("},", 0, limit - 1) + 1]
    return f"{text}}}".encode()


def with_value(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, path)

    return spoil


def with_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: tiny.change_config(folder, **changes)


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def sparse(path: Path) -> None:
    """Many times as large as the disk may be, of holes."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


LOCAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (tiny.truncate, "truncated"),
    "a header of a million tensors": (with_header(many_tensors(1_000_000)), "header of"),
    "as many tensors as a header may have": (
        with_header(many_tensors(100_000, 4 << 20)),
        "not a LoRA weight",
    ),
    "a header of numbers": (
        with_header(b"{" + b",".join(b'"%x":1' % n for n in range(300_000)) + b"}"),
        "bad header",
    ),
    "a header that claims to be all": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
        "truncated",
    ),
    "overlapping": (with_header({A0: entry([2], 0, 8), B0: entry([1], 4, 8)}, 8), "overlap"),
    "negative offsets": (with_header({A0: entry([1], -4, 0)}, 4), "bad header"),
    "offsets beyond the file": (with_header({A0: entry([1], 1 << 40, (1 << 40) + 4)}, 4), "gap"),
    "a shape beyond all": (with_header({A0: entry([1 << 60] * 8, 0, 4)}, 4), "offsets"),
    "a wrong shape": (with_header({A0: entry([1, 4], 0, 16), B0: entry([1], 16, 20)}, 20), "["),
    "a wrong dtype": (with_header({A0: entry([4], 0, 4, "I8")}, 4), "I8"),
    "NaN": (with_value(float("nan")), "finite"),
    "infinity": (with_value(float("inf")), "finite"),
    "rank 0": (with_config(r=0), "$.r"),
    "rank 100000": (with_config(r=100_000), "512"),
    "rank 100000 in the tensors": (
        with_header({A0: entry([100_000, 0], 0, 0), B0: entry([0, 100_000], 0, 0)}),
        "100000",
    ),
    "patterns that take for ever": (
        with_config(rank_pattern={r"(.*.*.*)*\1(\w+\w+)+#": 4}),
        "too long",
    ),
    "patterns without number": (
        with_config(rank_pattern={f"x{number}": 4 for number in range(30_000)}),
        "keys",
    ),
    "a config of nothing but depth": (
        lambda folder: (folder / CONFIG).write_bytes(b'{"r":' * 200_000),
        "not a JSON object",
    ),
    "an enormous file": (in_place_of(WEIGHTS, sparse), "at most"),
    "an enormous config": (in_place_of(CONFIG, sparse), "is the most"),
    "a link that leads out": (
        in_place_of(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")),
        "outside",
    ),
    "a link to itself": (in_place_of(WEIGHTS, lambda path: path.symlink_to(WEIGHTS)), "opened"),
    "a device": (in_place_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "ordinary"),
    "a FIFO": (in_place_of(WEIGHTS, os.mkfifo), "ordinary"),
    "a folder": (in_place_of(WEIGHTS, os.mkdir), "ordinary"),
    "a pickle": (pickled, "adapter_model.bin"),
    "a pickle in disguise": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x02}q\x00." * 99),
        "not a safetensors file",
    ),
}


def bomb(suffix: str) -> bytes:
    """A gigabyte of zeros, which is a megabyte of archive."""
    out = io.BytesIO()
    if suffix == ".zip":
        with (
            zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(WEIGHTS, "w", force_zip64=True) as member,
        ):
            for _ in range(1 << 10):
                member.write(bytes(1 << 20))
        return out.getvalue()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as zipped:
        info = tarfile.TarInfo(WEIGHTS)
        info.size = 1 << 30
        zipped.write(info.tobuf())
        for _ in range(1 << 10):
            zipped.write(bytes(1 << 20))
    return out.getvalue()


def processes_of_the_loader(server: Server) -> list[psutil.Process]:
    loader = psutil.Process(server.pid("adapter_loader"))
    return [loader, *loader.children(recursive=True)]


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def refused(place: Place, adapter: str, source: str = "local") -> str:
    """Its sentence, once it is sure that it took little, and was counted."""
    before = place.server.metric(LOADS)
    at_first = {}
    for process in processes_of_the_loader(place.server):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak is what it is now
        at_first[process.pid] = peak_bytes(process.pid)
    reply = httpx.post(
        f"{place.server.url}/v1/completions",
        json={"model": adapter, "prompt": "Hi", "max_tokens": 1, "adapter_source": source},
        timeout=SECONDS,
    )
    assert reply.status_code in (404, 422), reply.text
    for pid, nbytes in at_first.items():
        assert peak_bytes(pid) < nbytes + PEAK_BYTES
    # Once for the announcement, and again if that had failed before the prompt was tokenised.
    assert eventually(lambda: place.server.metric(LOADS) in (before + 1, before + 2))
    message = str(reply.json()["error"]["message"])
    assert message.startswith(f"adapter {adapter}: ")
    assert message.isprintable()
    assert len(message) < 1000
    assert str(place.root.parent) not in message
    return message


@pytest.fixture
def bystander(place: Place) -> Iterator[None]:
    """Somebody's stream, which runs through the test and must not notice it."""
    asked: tuple[str, str] = ("Once upon a time", "good")
    undisturbed = place.server.token_ids(*asked, max_new_tokens=100)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(place.server.token_ids, *asked, max_new_tokens=100)
        yield
        assert running.result() == undisturbed


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", LOCAL)
def test_an_adapter_is_refused_with_a_sentence_and_counted(place: Place, case: str) -> None:
    spoil, word = LOCAL[case]
    name = case.replace(" ", "-")
    spoil(Path(shutil.copytree(place.root / "good", place.root / name)))
    assert word in refused(place, name)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_an_archive_that_grows_is_refused_before_it_has(place: Place, suffix: str) -> None:
    place.web.files[f"/bomb{suffix}"] = Served(bomb(suffix))
    refused(place, f"{place.web.url}/bomb{suffix}", "http")
    kept = [path.stat().st_size for path in place.root.parent.rglob("cache/**/*")]
    assert sum(kept) < 16 << 20


NAMES = {
    "control characters": "a\x1b[31mb",
    "a new line": "x\nevent=ready",
    "10 KB": "x" * 10_240,
    "a zero": "good\0",
    "a folder above": "../outside",
    "a folder above, inside": "good/../../outside",
    "an absolute path": "/etc",
    "text that runs the other way": "good\u202e",
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_is_none_is_refused(place: Place, case: str) -> None:
    body = {"model": NAMES[case], "prompt": "Hi", "max_tokens": 1, "adapter_source": "local"}
    reply = httpx.post(f"{place.server.url}/v1/completions", json=body, timeout=SECONDS)
    assert reply.status_code in (400, 404)
    assert len(json.dumps(reply.json())) < 1000
    assert not any("x\x1b" in line or "xevent=ready" in line for line in place.server.lines)
    assert all(len(line) < 4000 for line in place.server.lines)


def test_every_refusal_is_a_line_of_the_log(place: Place) -> None:
    """Comes last."""

    def lines() -> int:
        return sum("event=adapter_failed" in line for line in place.server.lines)

    assert eventually(lambda: lines() == place.server.metric(LOADS) - 1), "1 of `good`"
    assert lines() >= len(LOCAL)
    assert "Traceback" not in place.server.output()
