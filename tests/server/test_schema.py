"""The app against its own OpenAPI document: whatever the document allows and much that it does not, never a 5xx."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="pip install schemathesis")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks

from e2llm.server import ServerSettings, create_app

EXAMPLES = 40


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPERATIONS = [
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/tokenize"),
    *("GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /metrics"),
]


@pytest.fixture
def schema(engine):
    # Few tokens an answer: what is tried here is what is said, not what is written.
    limits = ServerSettings(model_name="tiny", max_output_tokens=3, request_timeout_seconds=20)
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, limits))


@pytest.mark.filterwarnings("ignore")  # schemathesis' own
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_breaks_the_server(schema, name, mode):
    found = {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    assert found.keys() == set(OPERATIONS)
    if mode is GenerationMode.NEGATIVE and name.startswith("GET"):
        pytest.skip("nothing can be said wrongly")
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=found[name].as_strategy(generation_mode=mode))
    def go(case):
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    go()
    if name.startswith("POST") and mode is GenerationMode.NEGATIVE:
        assert statuses == {400}
    elif "chat" not in name and "{" not in name:  # the base has no chat template, and one model's name
        assert 200 in statuses


def test_the_document_says_what_is_ignored_and_refused(engine):
    from e2llm.server.schemas import IGNORED

    document = create_app(engine, ServerSettings(api_keys=("long-enough",))).openapi()
    told = document["paths"]["/v1/completions"]["post"]
    assert all(name in told["description"] for name in IGNORED)
    assert "422" not in told["responses"] and "429" in told["responses"]
    assert told["security"] == [{"key": []}] and "security" not in document["paths"]["/health"]["get"]
    assert document["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False
