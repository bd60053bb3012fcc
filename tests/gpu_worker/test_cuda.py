"""The worker on a GPU against itself on the CPU in fp32; skipped where there is no GPU."""

import mmap
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu_worker.arrivals import Arrival, Arrivals
from gpu_worker.cuda_adapter_pool import CudaAdapterPool
from gpu_worker.step_times import Moment
from gpu_worker.worker import Worker
from pipeline.adapter_layout import MODULES
from pipeline.messages import (
    AdapterCopy,
    AdapterMove,
    Logprobs,
    NewRow,
    PlaceAdapter,
    Pooling,
    PoolingKind,
    Sampling,
    Step,
)
from pipeline.model_config import read_model_config
from tests.gpu_worker.driving import GREEDY, Driver, Row, ints, make_worker, prompt
from tests.gpu_worker.packing import arena_of, pack, random_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SAMPLED = Sampling(temperature=0.7, top_p=0.9, top_k=50, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=2048,
        initializer_range=0.15,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    return made


def generate(worker: Worker, sampling: Sampling, block_tokens: int) -> list[Row]:
    """Three prompts at once, then one more while they decode; 12 tokens each."""
    driver = Driver(worker, blocks=range(100), block_tokens=block_tokens)
    for row, length in enumerate([5, 300, 17]):
        driver.add(row, prompt(row, length, 1000), sampling=sampling, logprobs=Logprobs())
    driver.generate([0, 1, 2], 6)
    driver.add(3, prompt(3, 40, 1000), sampling=sampling, logprobs=Logprobs())
    driver.step(decode=[0, 1, 2], prefill=[(3, 40)])
    for _ in range(5):
        driver.step(decode=[2, 0, 3, 1])
    return [driver.rows[row] for row in range(4)]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "flash"},
        {"attention": "flash", "cuda_graphs": False},
        {"attention": "triton", "kv_block_tokens": 16},
        {"attention": "triton", "kv_block_tokens": 16, "cuda_graphs": False},
        {"attention": "sdpa", "kv_block_tokens": 16},
    ],
    ids=["flash", "flash-eager", "triton", "triton-eager", "sdpa"],
)
def test_a_gpu_produces_what_a_cpu_does(
    folder: Path, settings: dict[str, Any], sampling: Sampling
) -> None:
    exact = generate(make_worker(folder, kv_block_tokens=16, kv_cache_bytes=1 << 24), sampling, 16)
    worker = make_worker(
        folder,
        dtype="float16",
        device="cuda",
        kv_cache_bytes=1 << 28,
        **{"kv_block_tokens": 256, **settings},
    )
    found = generate(worker, sampling, int(settings.get("kv_block_tokens", 256)))
    same = total = 0
    for one, other in zip(exact, found, strict=True):
        assert len(one.produced) == len(other.produced)
        for index, (a, b) in enumerate(zip(one.produced, other.produced, strict=True)):
            total += 1
            if a != b:
                break
            same += 1
            assert abs(one.logprobs[index][0] - other.logprobs[index][0]) < 0.05
    assert same / total > 0.9


def test_a_gpu_scores_prompts_and_likeliest_tokens_as_a_cpu_does(folder: Path) -> None:
    biased = Sampling(temperature=0.0, logit_bias=((7, -100.0), (9, 2.0)), min_tokens=2)
    scored: list[Row] = []
    for changes in (
        {"kv_block_tokens": 16, "kv_cache_bytes": 1 << 24},
        {"device": "cuda", "attention": "triton", "kv_block_tokens": 16, "kv_cache_bytes": 1 << 28},
    ):
        driver = Driver(make_worker(folder, **changes), blocks=range(100), block_tokens=16)
        wanted = Logprobs(3, prompt_top=2)
        driver.add(0, prompt(0, 300, 1000), sampling=biased, logprobs=wanted, end_token_ids=(3,))
        driver.step(prefill=[(0, 170)])
        driver.step(prefill=[(0, 130)])
        for _ in range(4):
            driver.step(decode=[0])
        scored.append(driver.rows[0])
    one, other = scored
    assert one.produced == other.produced
    for a, b in ((one.prompt_logprobs, other.prompt_logprobs), (one.logprobs, other.logprobs)):
        assert len(a) == len(b)
        for (own, likeliest), (own_there, likeliest_there) in zip(a, b, strict=True):
            assert own == pytest.approx(own_there, abs=0.01)
            values = [value for _, value in likeliest]
            assert values == pytest.approx([value for _, value in likeliest_there], abs=0.01)


def test_a_gpu_embeds_as_a_cpu_does(folder: Path) -> None:
    found = []
    for changes in (
        {"kv_block_tokens": 16, "kv_cache_bytes": 1 << 24},
        {"device": "cuda", "attention": "triton", "kv_block_tokens": 16, "kv_cache_bytes": 1 << 28},
    ):
        driver = Driver(make_worker(folder, **changes), blocks=range(100), block_tokens=16)
        driver.add(0, prompt(0, 300, 1000), pooling=Pooling(PoolingKind.MEAN))
        driver.add(1, prompt(1, 40, 1000), pooling=Pooling(PoolingKind.LAST))
        driver.add(2, prompt(2, 20, 1000))
        driver.add(3, prompt(3, 30, 1000), pooling=Pooling(PoolingKind.MEAN, normalize=False))
        driver.step(prefill=[(0, 170), (2, 20)])
        done = driver.step(decode=[2], prefill=[(3, 30), (0, 130), (1, 40)]).done
        found.append(torch.frombuffer(bytearray(done.embeddings), dtype=torch.float32).view(3, -1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


# --- adapters on their way -----------------------------------------------------------------------

RANKS = (512, 8, 16)  # of the test's adapters; the first is copied in several chunks
LONG = 1 << 31  # cycles: about a second
AT = 45 << 20  # in the pool
ARENAS: list[mmap.mmap] = []  # stay mapped, since they stay registered


def with_adapters(folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[Worker, Any]:
    """A worker, and the copies of one adapter for each of RANKS."""
    config = read_model_config(folder)
    shapes = config.module_shapes()
    packed = []
    for seed, rank in enumerate(RANKS):
        ranks = [rank] * (config.layers * len(MODULES))
        weights = random_weights(ranks=ranks, shapes=shapes, seed=seed, std=0.3 / rank**0.5)
        packed.append(pack(weights, layers=config.layers, shapes=shapes, dtype=dtype))
    arena, copies = arena_of(packed)
    ARENAS.append(arena)
    worker = make_worker(
        folder, dtype=str(dtype).removeprefix("torch."), adapter_pool_bytes=64 << 20, **settings
    )
    worker.attach_arena(arena)
    return worker, copies


def on_gpu(folder: Path, **settings: Any) -> tuple[Worker, tuple[AdapterCopy, ...]]:
    made: tuple[Worker, tuple[AdapterCopy, ...]] = with_adapters(
        folder,
        torch.float16,
        device="cuda",
        attention="triton",
        kv_block_tokens=16,
        kv_cache_bytes=1 << 28,
        **settings,
    )
    return made


def hold_copies(worker: Worker) -> None:
    """What is placed from now on arrives late."""
    assert isinstance(worker.adapters, CudaAdapterPool)
    torch.cuda.synchronize()
    with torch.cuda.stream(worker.adapters.stream):
        torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]


def generate_with_adapters(worker: Worker, copies: tuple[AdapterCopy, ...]) -> list[int]:
    """Each adapter is placed right before the first prefill with it."""
    driver = Driver(worker, blocks=range(100), block_tokens=16)
    for row, copy in enumerate(copies):
        driver.add(row, prompt(row, 20 + row, 1000), slot=copy.slot)
        if isinstance(worker.adapters, CudaAdapterPool):
            hold_copies(worker)
        driver.step(decode=range(row), prefill=[(row, 20 + row)], copies=(copy,))
    for _ in range(6):
        driver.step(decode=range(len(copies)))
    return [token for row in driver.rows.values() for token in row.produced]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_waits_for_the_adapters_that_it_uses(folder: Path, cuda_graphs: bool) -> None:
    exact = generate_with_adapters(
        *with_adapters(
            folder, torch.float32, device="cpu", kv_block_tokens=16, kv_cache_bytes=1 << 24
        )
    )
    found = generate_with_adapters(*on_gpu(folder, cuda_graphs=cuda_graphs))
    same = [a == b for a, b in zip(exact, found, strict=True)]
    assert sum(same) / len(same) > 0.9


def test_a_graph_waits_for_the_whole_adapter(folder: Path) -> None:
    """A decode row whose adapter was overwritten by itself, as a prefix hit could bring about."""
    worker, copies = on_gpu(folder)
    driver = Driver(worker, blocks=range(100), block_tokens=16)
    driver.add(0, prompt(1, 20, 1000), slot=2)
    driver.step(prefill=[(0, 20)], copies=copies)
    expected = [driver.step(decode=[0]).tokens[0] for _ in range(2)]
    driver.free(0)
    driver.add(0, prompt(1, 20, 1000), slot=2)
    driver.prefill_all([0])
    assert isinstance(worker.adapters, CudaAdapterPool)
    torch.cuda.synchronize()
    worker.adapters._pool.zero_()  # what a step that does not wait would read
    hold_copies(worker)
    worker.place(PlaceAdapter(copies[2]))
    assert [driver.step(decode=[0]).tokens[0] for _ in range(2)] == expected


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_does_not_wait_for_adapters_that_it_does_not_use(
    folder: Path, cuda_graphs: bool
) -> None:
    worker, copies = on_gpu(folder, cuda_graphs=cuda_graphs)
    driver = Driver(worker, blocks=range(100), block_tokens=16)
    driver.add(0, prompt(1, 20, 1000), slot=1)
    driver.add(1, prompt(2, 20, 1000))
    driver.step(prefill=[(0, 20), (1, 20)], copies=copies[1:2])
    torch.cuda.synchronize()
    assert worker.adapters.placed() == [1]

    def steps_of_others(row: int) -> None:
        """A decode step and a prefill."""
        driver.step(decode=[0, 1])
        new = NewRow(row, 1, ints(prompt(3, 9, 1000)), 9, 0, ints([90 + row]), GREEDY, None)
        worker.run(Step(99, prefill=ints([row, 0, 9]), new_rows=(new,)))

    steps_of_others(2)  # loads the kernels, which may wait for the whole device
    hold_copies(worker)
    worker.place(PlaceAdapter(copies[0]))
    steps_of_others(3)
    assert worker.adapters.placed() == []  # so no step has waited
    torch.cuda.synchronize()
    assert worker.adapters.placed() == [0]


def test_the_arena_may_change_once_an_adapter_is_placed(folder: Path) -> None:
    worker, copies = on_gpu(folder)
    assert isinstance(worker.adapters, CudaAdapterPool)
    arena, copy = ARENAS[-1], copies[0]
    hold_copies(worker)
    worker.place(PlaceAdapter(copy))
    assert worker.adapters.placed() == []
    while not worker.adapters.placed():
        pass
    held = worker.adapters._pool[copy.pool_offset : copy.pool_offset + copy.nbytes]
    assert bytes(held.cpu().numpy()) == arena[copy.arena_offset : copy.arena_offset + copy.nbytes]


def test_the_first_layers_do_not_wait_for_the_last_ones() -> None:
    copies, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
    with torch.cuda.stream(copies):
        events[0].record()
        torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
        events[1].record()
    arrivals = Arrivals([Arrival(((0, events[0]), (2, events[1])))])
    reached = []
    for layer in range(4):
        arrivals.enter(layer)
        reached.append(here.record_event())
    reached[1].synchronize()
    assert not events[1].query()  # type: ignore[no-untyped-call]
    assert not reached[2].query()
    reached[3].synchronize()
    assert events[1].query()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("in_use", [True, False])
@pytest.mark.parametrize("shift", [256, 40 << 20], ids=["overlapping", "apart"])
@pytest.mark.parametrize("slot", [0, 2])
def test_an_adapter_that_is_moved_stays_the_same(
    folder: Path, slot: int, shift: int, in_use: bool
) -> None:
    worker, copies = on_gpu(folder)
    moved = copies[slot]
    assert AT + moved.nbytes + copies[1].nbytes < worker.adapters.nbytes
    placed = replace(moved, pool_offset=AT)
    driver = Driver(worker, blocks=range(100), block_tokens=16)
    for row in (0, 1):
        driver.add(row, prompt(1, 20, 1000), slot=slot)
    driver.step(prefill=[(0, 20)], copies=(placed,))
    expected = [driver.step(decode=[0]).tokens[0] for _ in range(8)]

    driver.prefill_all([1])
    found = [driver.step(decode=[1]).tokens[1] for _ in range(4)]
    torch.cuda.synchronize()
    worker.adapters.placed()
    move = AdapterMove(slot, AT, AT - shift, moved.nbytes, in_use)
    copy = replace(copies[1], pool_offset=AT - shift + moved.nbytes)  # over its old bytes
    if in_use:
        launched = worker.launch(Step(50, decode_rows=ints([1])))  # still reads the old place
        worker.place(PlaceAdapter(copy, (move,)))
        found += array("i", launched.result().token_ids)
        driver.rows[1].tokens.append(found[-1])
        driver.rows[1].computed += 1
    else:
        hold_copies(worker)
        worker.place(PlaceAdapter(copy, (move,)))
    while len(found) < 8:
        found.append(driver.step(decode=[1]).tokens[1])
    assert found == expected
    torch.cuda.synchronize()
    assert worker.adapters.placed() == [1]


def test_the_device_is_busy_and_idle_by_its_own_clock() -> None:
    device = torch.device("cuda")
    torch.cuda.synchronize()
    first = Moment(device)
    torch.cuda._sleep(LONG // 10)  # type: ignore[no-untyped-call]
    second = Moment(device)
    assert not second.is_past
    second.wait()
    assert 0.02 < second.seconds_since(first) < 1


def test_what_is_compiled_ahead_is_not_launched_and_there_afterwards() -> None:
    from gpu_worker.kernels.compiling import compiling_ahead
    from gpu_worker.kernels.triton_ops import silu_mul

    x = torch.randn((3, 2 * 77), device="cuda", dtype=torch.float16)
    out = torch.zeros((3, 77), device="cuda", dtype=torch.float16)
    with compiling_ahead():
        silu_mul(x, out=out)
    assert not out.any()
    gate, up = x.float().chunk(2, 1)
    torch.testing.assert_close(
        silu_mul(x, out=out).float(), torch.nn.functional.silu(gate) * up, rtol=1e-2, atol=1e-2
    )
