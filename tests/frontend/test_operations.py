"""Health, facts, metrics and models."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from frontend.adapters import scope_of
from frontend.processes import Processes
from pipeline.messages import AdapterKey, ProcessReady, Stats
from pipeline.metrics import snapshot
from tests.frontend.fakes import FACTS, OTHERS, Backend, make_adapter, says, settings

LORAX_FACTS = [
    "model_id",
    "model_sha",
    "model_dtype",
    "model_device_type",
    "model_pipeline_tag",
    "max_concurrent_requests",
    "max_best_of",
    "max_stop_sequences",
    "max_input_length",
    "max_total_tokens",
    "waiting_served_ratio",
    "max_batch_total_tokens",
    "max_waiting_tokens",
    "validation_workers",
    "eager_prefill",
    "version",
    "sha",
    "docker_label",
    "request_logger_url",
]

pytestmark = pytest.mark.anyio


def families(value: float) -> Stats:
    registry = CollectorRegistry()
    Counter("loradex_steps", "Steps", registry=registry).inc(value)
    return Stats("scheduler", 0, snapshot(registry))


async def test_the_last_process_that_is_waited_for_makes_it_ready_once() -> None:
    processes = Processes(settings(tokenizer_workers=2))
    assert processes.missing() == sorted(OTHERS)
    for process in OTHERS:
        assert not processes.ready(ProcessReady(process))
    assert processes.missing() == ["tokenizer_workers"]
    assert processes.ready(ProcessReady("tokenizer_workers", 1))
    assert processes.missing() == []
    assert not processes.ready(ProcessReady("gpu_worker"))  # it was started again


async def test_a_process_that_dies_makes_it_unready_until_another_takes_its_place() -> None:
    backend = Backend()
    backend.processes.died("gpu_worker", 0, "signal 9 (Killed)")
    unhealthy = await backend.get("/health")
    assert unhealthy.status_code == 503
    assert unhealthy.json()["error"].endswith(
        "waiting for gpu_worker; gpu_worker died: signal 9 (Killed)"
    )
    assert backend.processes.missing() == []  # so requests are let in, and wait
    backend.processes.died("gpu_worker", 0)  # it has started, and is not ready
    assert backend.processes.waits_for().endswith("signal 9 (Killed)")
    assert backend.processes.ready(ProcessReady("gpu_worker"))
    assert (await backend.get("/health")).status_code == 200


async def test_the_death_of_a_frontend_is_nothing_to_the_others() -> None:
    backend = Backend()
    backend.processes.died("frontend", 1, "signal 9 (Killed)")
    assert (await backend.get("/health")).status_code == 200


@pytest.mark.parametrize("route", ["/", "/health", "/ping"])
async def test_it_is_healthy_from_ready_to_drain(route: str) -> None:
    starting = await Backend(ready=False).get(route)
    assert starting.status_code == 503
    assert starting.json()["error_type"] == "healthcheck"
    assert "scheduler" in starting.json()["error"]

    backend = Backend()
    healthy = await backend.get(route)
    assert (healthy.status_code, healthy.content) == (200, b"")
    await backend.downstream.drain(0)
    assert (await backend.get(route)).status_code == 503


async def test_info_has_loraxs_facts_and_those_of_each_process() -> None:
    facts = (await Backend(max_concurrent_requests=7).get("/info")).json()
    assert facts["model_id"] == "some/base"
    assert facts["model_dtype"] == "float32"
    assert facts["model_device_type"] == "cpu"
    assert facts["max_concurrent_requests"] == 7
    assert facts["max_total_tokens"] == 512
    assert facts["max_input_length"] == 511
    assert facts["max_best_of"] == 128
    assert facts["max_batch_total_tokens"] == 1600
    assert facts["processes"]["gpu_worker"] == FACTS["gpu_worker"]


async def test_info_has_every_field_of_loraxs() -> None:
    facts = (await Backend().get("/info")).json()
    assert set(LORAX_FACTS) <= facts.keys()


async def test_info_says_what_is_known_while_others_start() -> None:
    facts = (await Backend(ready=False).get("/info")).json()
    assert facts["max_input_length"] is None
    assert facts["processes"] == {}


async def test_metrics_are_the_latest_of_each_process() -> None:
    backend = Backend()
    backend.processes.stats(families(1))
    backend.processes.stats(families(2))
    reply = await backend.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = reply.text.splitlines()
    assert 'loradex_steps_total{index="0",process="scheduler"} 2.0' in lines
    assert 'loradex_requests_in_flight{index="0",process="frontend"} 0.0' in lines


async def test_requests_in_flight_are_counted_as_they_are() -> None:
    backend = Backend()
    backend.downstream.admission.enter()
    text = (await backend.get("/metrics")).text
    assert 'loradex_requests_in_flight{index="0",process="frontend"} 1.0' in text


async def test_the_models_are_the_base_and_the_adapters_that_are_there(tmp_path: Path) -> None:
    make_adapter(tmp_path, "b")
    make_adapter(tmp_path, "a")
    (tmp_path / "no-adapter").mkdir()
    backend = Backend(adapter_root=(str(tmp_path),))
    listed = (await backend.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["some/base", "a", "b"]
    assert [model["parent"] for model in listed["data"]] == [None, "some/base", "some/base"]
    assert {model["object"] for model in listed["data"]} == {"model"}


async def test_a_private_adapter_is_listed_for_who_has_its_token() -> None:
    backend = Backend(says("Hello"))
    body = {"model": "org/private", "prompt": "Hi"}
    mine = {"Authorization": "Bearer hf_mine"}
    await backend.post("/v1/completions", body, headers=mine)
    (prompt,) = backend.prompts()
    assert prompt.adapter == AdapterKey("hub", "org/private", "", scope_of("hf_mine"))
    for headers, count in ((mine, 2), ({}, 1), ({"Authorization": "Bearer hf_theirs"}, 1)):
        listed = (await backend.get("/v1/models", headers=headers)).json()["data"]
        assert len(listed) == count


async def test_a_token_that_cannot_be_is_refused_in_openais_shape() -> None:
    async with Backend().client() as client:
        reply = await client.get("/v1/models", headers={"Authorization": "Bearer " + "x" * 5000})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "api_token"
