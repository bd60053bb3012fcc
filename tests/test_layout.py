"""The structure of the project: who may import what, whose names are ours, what the docs list."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")

# package -> the third-party names that it may import
ALLOWED = {
    "frontend": {
        "msgspec",
        "opentelemetry",  # of the extra
        "prometheus_client",
        "starlette",
        "uvicorn",
        "uvloop",
    },
    "pipeline": {"llguidance", "msgspec", "zmq", "prometheus_client", "tqdm"},
    "tokenizer_workers": {"jinja2", "llguidance", "msgspec", "prometheus_client", "tokenizers"},
    "scheduler": {"msgspec", "prometheus_client"},
    "gpu_worker": {
        "flash_attn",
        "llguidance",
        "msgspec",
        "numpy",
        "prometheus_client",
        "safetensors",
        "torch",
        "triton",
    },
    "adapter_loader": {
        "blake3",
        "botocore",
        "gguf",
        "huggingface_hub",
        "msgspec",
        "numpy",
        "prometheus_client",
        "safetensors",
        "torch",
    },
}
# modules that decide and never talk: no socket, no clock, no thread, no file
PURE = (
    "scheduler/adapters.py",
    "scheduler/administration.py",
    "scheduler/catalogue.py",
    "scheduler/core.py",
    "scheduler/sequence.py",
    "scheduler/grammars.py",
    "scheduler/kv_blocks.py",
    "scheduler/adapter.py",
    "scheduler/adapter_pool.py",
    "scheduler/policy.py",
    "scheduler/fair_share.py",
    "scheduler/loads.py",
    "scheduler/step_cost.py",
    "scheduler/timings.py",
    "tokenizer_workers/checked_grammars.py",
    "tokenizer_workers/core.py",
    "tokenizer_workers/decode.py",
    "tokenizer_workers/known_texts.py",
    "tokenizer_workers/own_texts.py",
    "tokenizer_workers/renderings.py",
    "tokenizer_workers/stop_strings.py",
    "tokenizer_workers/token_table.py",
    "tokenizer_workers/tool_calls.py",
    "tokenizer_workers/tool_formats.py",
    "tokenizer_workers/tool_messages.py",
    "tokenizer_workers/turns.py",
    "adapter_loader/core.py",
    "adapter_loader/arena_space.py",
    "adapter_loader/recent_failures.py",
    "adapter_loader/text_questions.py",
    "adapter_loader/traces.py",
    "gpu_worker/prefill_traces.py",
    "frontend/streams.py",
    "frontend/adapter_ids.py",
    "frontend/adapter_labels.py",
    "frontend/aliases.py",
    "frontend/admission.py",
    "frontend/deadlines.py",
    "frontend/docs_page.py",
    "frontend/metric_aliases.py",
    "frontend/openapi.py",
    "pipeline/adapter_layout.py",
    "pipeline/messages.py",
)
IMPURE = {"asyncio", "os", "pathlib", "socket", "threading", "time", "torch", "zmq", "subprocess"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The top-level names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_row_of_the_table_allows(package: str) -> None:
    allowed = ALLOWED[package] | {package, "pipeline"} | sys.stdlib_module_names
    for path in sources(package):
        strange = set(imports(path)) - allowed
        assert not strange, f"{path.relative_to(ROOT)} imports {sorted(strange)}"


@pytest.mark.parametrize("package", ALLOWED)
def test_the_table_allows_nothing_that_is_not_imported(package: str) -> None:
    used = {name for path in sources(package) for name in imports(path)}
    assert not ALLOWED[package] - used


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_neither_talks_nor_looks_at_a_clock(module: str) -> None:
    assert not set(imports(ROOT / module)) & IMPURE


def test_no_installed_distribution_owns_a_name_of_ours() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in (*PROCESSES, "pipeline"):
        assert set(owners.get(name, ["loradex"])) == {"loradex"}


def test_each_process_is_a_folder_a_module_and_a_line_of_the_procfile() -> None:
    start = "exec python -m pipeline.keep_alive"
    lines = (ROOT / "procfile").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name}: {start} {name}" for name in PROCESSES)
    for name in PROCESSES:
        assert (ROOT / name / "__main__.py").is_file()


def test_the_architecture_page_has_one_line_for_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    listed = [line.split("`")[1] for line in page if line.startswith("- `") and ".py`" in line]
    modules = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sources(package)
        if path.name != "__init__.py"
    ]
    assert sorted(listed) == sorted(modules)
