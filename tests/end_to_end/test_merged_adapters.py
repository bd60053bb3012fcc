"""A request with merged adapters is answered as transformers + PEFT answer with the merged one."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from adapter_loader.merging import drop_at_random, seed_of
from pipeline.messages import Merge, MergeStrategy
from tests.end_to_end.oracle import Oracle
from tests.end_to_end.server import Server

TOKENS = 12
PROMPT = "Once upon a time, in a small village"
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"ids": ["all_linear", "stored_fp16"], "weights": [0.7, 0.6]},
    "ties": {
        "ids": ["all_linear", "stored_fp16"],
        "weights": [1.0, 0.8],
        "merge_strategy": "ties",
        "density": 0.6,
        "majority_sign_method": "frequency",
    },
    "cat": {"ids": ["qv", "all_linear"], "weights": [1.0, -0.5], "merge_strategy": "cat"},
    "scaled": {"ids": ["all_linear"], "weights": [0.5]},
    "dare_linear": {
        "ids": ["all_linear", "stored_fp16"],
        "weights": [0.7, 0.6],
        "merge_strategy": "dare_linear",
        "density": 0.7,
        "seed": 5,
    },
    "dare_ties": {
        "ids": ["all_linear", "stored_fp16"],
        "weights": [1.0, 0.8],
        "merge_strategy": "dare_ties",
        "density": 0.8,
        "seed": 6,
    },
}
WEIGHTS = "adapter_model.safetensors"


def drop(source: Path, target: Path, merge: Merge, part: int) -> None:
    """An adapter as DARE leaves it, by the lots that the server draws."""
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS)
    for name, tensor in tensors.items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        seed = seed_of(merge, part, f"{module}.{side[0]}")
        tensors[name] = drop_at_random(tensor.float(), merge.density, seed)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def merge_root(adapter_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of rank 8 and one of rank 4."""
    root = tmp_path_factory.mktemp("merge")
    for name in ("qv", "all_linear", "stored_fp16"):
        shutil.copytree(adapter_root / name, root / name)
    return root


@pytest.fixture(scope="module")
def oracle(
    model_folder: Path, merge_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Oracle:
    """It has all of MERGES beside the adapters, as PEFT merges them.

    PEFT draws lots of its own for DARE: it merges what is left by ours, without dropping more.
    """
    folders = {path.name: path for path in sorted(merge_root.iterdir())}
    parts_of: dict[str, list[str]] = {}
    dropped = tmp_path_factory.mktemp("dropped")
    for name, how in MERGES.items():
        parts_of[name] = how["ids"]
        if "seed" in how:
            strategy = MergeStrategy(how["merge_strategy"])
            merge = Merge((), strategy, density=how["density"], seed=how["seed"])
            parts_of[name] = [f"{name}_{id}" for id in how["ids"]]
            for part, (id, left) in enumerate(zip(how["ids"], parts_of[name], strict=True)):
                folders[left] = dropped / left
                drop(merge_root / id, folders[left], merge, part)
    oracle = Oracle(model_folder, folders)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0 is greater than or equal to 1")
        for name, how in MERGES.items():
            oracle.merge(
                name,
                adapters=parts_of[name],
                weights=how["weights"],
                combination_type=how.get("merge_strategy", "linear").removeprefix("dare_"),
                density=1.0 if "seed" in how else how.get("density"),
                majority_sign_method=how.get("majority_sign_method", "total"),
            )
    return oracle


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], merge_root: Path) -> Server:
    return serve(adapter_root=merge_root, dtype="float32")


@pytest.mark.parametrize("merge", MERGES)
def test_the_tokens_are_those_of_pefts_merge(server: Server, oracle: Oracle, merge: str) -> None:
    asked: dict[str, Any] = {"adapter_source": "local", "merged_adapters": MERGES[merge]}
    tokens = server.token_ids(PROMPT, max_new_tokens=TOKENS, **asked)
    assert tokens == oracle.greedy(PROMPT, merge, tokens)


def test_every_merge_changes_the_answer(server: Server) -> None:
    """Else the other tests would say nothing."""
    answers = {
        tuple(server.token_ids(PROMPT, max_new_tokens=TOKENS, merged_adapters=merge))
        for merge in (None, *MERGES.values())
    }
    assert len(answers) == 1 + len(MERGES)


def test_the_openai_routes_merge_as_well(server: Server) -> None:
    body = {
        "model": "",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "merged_adapters": MERGES["cat"],
    }
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    by_lorax = server.generate(PROMPT, merged_adapters=MERGES["cat"], max_new_tokens=TOKENS)
    assert reply.json()["choices"][0]["text"] == by_lorax["generated_text"]


def test_a_part_that_is_missing_is_named(server: Server) -> None:
    merge = {"ids": ["qv", "nowhere"], "weights": [1, 1]}
    parameters = {"merged_adapters": merge, "adapter_source": "local"}
    body = {"inputs": PROMPT, "parameters": parameters}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    assert reply.status_code == 424
    assert "part nowhere" in reply.json()["error"]
