"""What OpenTelemetry's variables ask for, and what they are told that are not understood."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from gateway.otel import Tracing
from gateway.settings import SettingsError


def read(**environment: str) -> Tracing:
    found = Tracing.read({"OTEL_TRACES_EXPORTER": "otlp", **environment}, "1.2.3")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "gateway"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_EXPORTER": ""}, False),
        ({"OTEL_TRACES_EXPORTER": " OTLP"}, True),
        ({"OTEL_TRACES_EXPORTER": "None", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_traces_are_on_where_they_are_asked_for_or_where_it_is_said_where_they_go(
    environment: dict[str, str], asked: bool
) -> None:
    assert (Tracing.read(environment, "1") is not None) == asked


def test_the_variables_for_traces_come_before_those_for_all() -> None:
    both = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4318/", "OTEL_EXPORTER_OTLP_HEADERS": "a=1,b=x%20y"}
    assert (read(**both).endpoint, read(**both).headers) == ("http://all:4318/v1/traces", {"a": "1", "b": "x y"})
    own = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://own/here", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "c=2"}
    assert (read(**both, **own).endpoint, read(**both, **own).headers) == ("https://own/here", {"c": "2"})
    assert read().endpoint == "http://localhost:4318/v1/traces"


def test_durations_are_milliseconds() -> None:
    found = read(OTEL_EXPORTER_OTLP_TIMEOUT="2500", OTEL_BSP_SCHEDULE_DELAY="100")
    assert (found.timeout, found.delay) == (2.5, 0.1)


def test_a_process_says_who_it_is() -> None:
    found = read(OTEL_RESOURCE_ATTRIBUTES="service.name=no,k8s.pod.name=p%2C1", OTEL_SERVICE_NAME="front").resource
    assert (found["service.name"], found["service.version"], found["k8s.pod.name"]) == ("front", "1.2.3", "p,1")
    assert read().resource["service.name"] == "model-gateway"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, 'OTEL_TRACES_EXPORTER is "zipkin", expected otlp or none'),
        ({"OTEL_TRACES_SAMPLER": "some"}, 'OTEL_TRACES_SAMPLER is "some", expected one of always_on, '),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "expected a number from 0 to 1"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "x"}, 'ARG is "x", expected a number'),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "expected http/protobuf; without traces: OTEL_TRACES_EXPORTER=none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no address, expected one"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:99999"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no address"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "br"}, 'OTEL_EXPORTER_OTLP_COMPRESSION is "br", expected none or gzip'),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}, 'OTEL_EXPORTER_OTLP_TIMEOUT is "10s", expected a number from 1 on'),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, 'OTEL_BSP_MAX_QUEUE_SIZE is "100", expected a number from 512 on'),
        ({"OTEL_RESOURCE_ATTRIBUTES": "a"}, "OTEL_RESOURCE_ATTRIBUTES is another text, expected key=value"),
    ],
)
def test_what_is_not_understood_is_told_with_what_was_expected(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(SettingsError) as told:
        read(**environment)
    assert expected in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("HEADERS", "a=x%0Ab"), ("HEADERS", "a=caf%C3%A9"), ("HEADERS", "a b=1"), ("HEADERS", "ä=1")),
        *(("ENDPOINT", "http://a b:1"), ("ENDPOINT", "http://c:4318/\x00"), ("ENDPOINT", "http://é:1")),
    ],
)
def test_what_no_request_can_have_is_told_at_the_start_and_not_with_every_batch(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^OTEL_EXPORTER_OTLP_{name} "):
        read(**{f"OTEL_EXPORTER_OTLP_{name}": value})


def test_names_of_headers_and_of_samplers_are_the_same_in_any_case() -> None:
    assert read(OTEL_EXPORTER_OTLP_HEADERS="X-Key=A b").headers == {"x-key": "A b"}
    assert read(OTEL_TRACES_SAMPLER=" Always_Off ").ratio == 0


def test_headers_and_addresses_are_not_told_for_they_may_hold_keys() -> None:
    for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        with pytest.raises(SettingsError) as told:
            read(**{name: "sk-secret"})
        assert "sk-secret" not in str(told.value)
    held = read(OTEL_EXPORTER_OTLP_HEADERS="key=sk-secret", OTEL_EXPORTER_OTLP_ENDPOINT="http://u:sk-secret@c")
    assert "sk-secret" not in repr(held)


# — sampling


@pytest.mark.parametrize(
    ("sampler", "new", "recorded", "unrecorded"),
    [
        ("always_on", True, True, True),
        ("always_off", False, False, False),
        ("parentbased_always_on", True, True, False),
        ("parentbased_always_off", False, True, False),
        ("parentbased_traceidratio", False, True, False),
        ("traceidratio", False, False, False),
    ],
)
def test_a_callers_word_holds_where_the_sampler_is_based_on_it(
    sampler: str, new: bool, recorded: bool, unrecorded: bool
) -> None:
    found = read(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG="0")
    assert [found.sampled(b"a" * 32, parent) for parent in (None, True, False)] == [new, recorded, unrecorded]


@given(trace=st.binary(min_size=16, max_size=16), ratio=st.sampled_from([0.0, 1e-9, 0.01, 0.1, 0.5, 0.999, 1.0]))
def test_a_ratio_takes_the_traces_that_all_others_take(trace: bytes, ratio: float) -> None:
    ours = read(OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG=str(ratio))
    theirs = TraceIdRatioBased(ratio).should_sample(None, int.from_bytes(trace, "big"), "any")
    assert ours.sampled(trace.hex().encode(), None) == (theirs.decision is Decision.RECORD_AND_SAMPLE)
