"""The document of the API, held against the whole server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from frontend.openapi import OPERATIONS, Operation
from tests.end_to_end import tiny
from tests.end_to_end.server import Server

EXAMPLES = 15  # for each operation with a body, of what it takes and of what it does not
OTHERS = 2
POSITIVE = GenerationMode.POSITIVE  # what takes no body takes nothing that could be wrong
# Much that is refused no schema can say, as that a prompt is longer than the context.
MORE_THAN_SCHEMAS_SAY = positive_data_acceptance


@pytest.fixture(scope="module")
def api(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> schemathesis.BaseSchema:
    folder = tmp_path_factory.mktemp("openapi")
    model = tiny.make_model(folder / "model", model_folder)
    tiny.make_adapter(folder / "root" / "good", model)
    server = serve(
        environment={"HF_HUB_OFFLINE": "1", "LORADEX_ALLOW_ADAPTER_ADMIN": "true"},
        model_folder=model,
        adapter_root=folder / "root",
        default_adapter_source="local",
        max_total_tokens=64,
    )
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("operation", "mode"),
    [(one, mode) for one in OPERATIONS for mode in GenerationMode if one.body or mode == POSITIVE],
    ids=lambda one: f"{one.method} {one.path}" if isinstance(one, Operation) else one.value,
)
def test_whatever_is_sent_is_answered_as_the_document_says(
    api: schemathesis.BaseSchema, operation: Operation, mode: GenerationMode
) -> None:
    """Never with an error of ours, always with a body of the type that is described, and never
    as if it had been understood when it is none of what the document allows."""
    cases = api[operation.path][operation.method.upper()].as_strategy(generation_mode=mode)

    @settings(
        max_examples=OTHERS if operation.body is None else EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def holds(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(timeout=60, excluded_checks=[MORE_THAN_SCHEMAS_SAY])

    holds()
