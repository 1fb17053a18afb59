"""docs/openapi.json says what the server does; random requests after it get no answer that it does not list."""

import json
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from serving import make_engine, served

from nanochat_jax.serve import app, fields

PATH = Path(__file__).parents[2] / "docs/openapi.json"
API = json.loads(PATH.read_text())
SCHEMAS = API["components"]["schemas"]


def test_routes_and_ranges_are_those_of_the_code():
    listed = {f"{method.upper()} {path}" for path, methods in API["paths"].items() for method in methods}
    assert listed == set(app.ROUTES)
    for schema, own in (("Chat", {"messages", "top_logprobs"}), ("Text", {"prompt"})):
        properties = SCHEMAS[schema]["properties"]
        assert set(properties) == fields.COMMON | own
        for name, (kind, least, most, default) in fields.NUMBERS.items():
            stated = properties[name]
            assert stated["type"] == ["integer" if kind is int else "number", "null"]
            assert stated["exclusiveMinimum" if name in fields.POSITIVE else "minimum"] == least
            assert stated["maximum"] == most and stated.get("default") == default
        assert properties["stop"]["anyOf"][1]["maxItems"] == fields.MAX_STOPS
        assert properties["logit_bias"]["maxProperties"] == fields.MAX_BIASED
    assert SCHEMAS["Chat"]["properties"]["messages"]["maxItems"] == fields.MAX_MESSAGES
    assert SCHEMAS["Message"]["properties"]["content"]["anyOf"][0]["maxLength"] == fields.MAX_CHARACTERS
    assert set(SCHEMAS["Message"]["properties"]["role"]["enum"]) == set(fields.ROLES)


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_random_requests():
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis
    from schemathesis.specs.openapi import checks

    conform = [
        schemathesis.checks.not_a_server_error, checks.status_code_conformance,
        checks.content_type_conformance, checks.response_schema_conformance,
    ]  # fmt: skip
    api, modes = schemathesis.openapi.from_dict(API), schemathesis.GenerationMode
    with served(make_engine(capacity=64)) as (_, port):
        for operation in api.get_all_operations():
            for mode in (modes.POSITIVE, modes.NEGATIVE):
                if mode is modes.NEGATIVE and operation.ok().method == "get":
                    continue

                @hypothesis.settings(
                    max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
                )
                @hypothesis.given(operation.ok().as_strategy(generation_mode=mode))
                def ask(case):
                    case.call_and_validate(base_url=f"http://127.0.0.1:{port}", checks=conform)

                ask()
