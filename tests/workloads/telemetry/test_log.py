"""What a log record says, and what it must never say."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from workloads.telemetry import log

PSEUDONYM = "p1-" + "0f" * 16


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    log.configure("intake", "onprem", "info", out)
    yield out
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_line_with_role_and_site(stream: io.StringIO):
    log.get(component="store").info("opened", rows=3)
    (record,) = records(stream)
    assert record["event"] == "opened"
    assert (record["role"], record["site"], record["level"], record["rows"]) == ("intake", "onprem", "info", 3)
    assert record["component"] == "store"
    assert record["time"].endswith("Z")


def test_a_logger_made_before_configure_follows_it():
    early = log.get()
    out = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log.configure("gateway", "aws", "info", out)
        early.info("late")
        assert records(out)[0]["role"] == "gateway"
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


def test_records_below_the_level_are_dropped(stream: io.StringIO):
    log.get().debug("quiet")
    logging.getLogger("uvicorn.error").debug("quiet too")
    assert stream.getvalue() == ""


def test_records_of_libraries_take_the_same_way_out(stream: io.StringIO):
    logging.getLogger("uvicorn.error").warning("port %d busy, Authorization: Bearer abc.def", 8080)
    (record,) = records(stream)
    assert record["event"] == "port 8080 busy, Authorization: Bearer [redacted]"
    assert (record["logger"], record["level"], record["role"]) == ("uvicorn.error", "warning", "intake")


def test_a_request_id_is_on_every_record_of_its_request_and_on_no_other(stream: io.StringIO):
    with log.request_context("r-1", endpoint="/v1/events"):
        log.get().info("inside")
    log.get().info("outside")
    inside, outside = records(stream)
    assert (inside["request_id"], inside["endpoint"]) == ("r-1", "/v1/events")
    assert "request_id" not in outside


@pytest.mark.parametrize(
    "name",
    ["pseudonym_key", "api_token", "Authorization", "db_password", "secretValue", "aws_secret_access_key", "PSK"],
)
def test_a_secret_is_known_by_its_name(stream: io.StringIO, name: str):
    log.get().info("x", **{name: "hunter2hunter2"})
    assert "hunter2" not in stream.getvalue()
    assert records(stream)[0][name] == log.REDACTED


def test_names_that_only_resemble_secrets_are_kept(stream: io.StringIO):
    log.get().info("x", key_epoch=1, token_buckets=20_011, key_path="a/b", monkey="see")
    record = records(stream)[0]
    assert (record["key_epoch"], record["token_buckets"], record["key_path"], record["monkey"]) == (
        1,
        20_011,
        "a/b",
        "see",
    )


@pytest.mark.parametrize(
    "value",
    [
        {"inner": {"session_token": "hunter2"}},
        [{"password": "hunter2"}],
        {"secret": {"a": ["hunter2"]}},
        {"site_key": {"a": "hunter2"}},
        "https://root:hunter2@db.example/x",
        "sent Bearer hunter2 to it",
        "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----",
    ],
)
def test_a_secret_is_found_wherever_it_is(stream: io.StringIO, value: object):
    log.get().info("x", detail=value)
    assert "hunter2" not in stream.getvalue()
    assert log.REDACTED in stream.getvalue()


def test_bytes_never_pass(stream: io.StringIO):
    log.get().info("x", payload=b"\x01secret")
    assert records(stream)[0]["payload"] == "[7 bytes]"


def test_raw_ids_of_people_are_replaced_and_pseudonyms_stay(stream: io.StringIO):
    log.get().info(
        "x",
        user="17850",
        users=["12", PSEUDONYM],
        user_id="a@b.c",
        who={"user": PSEUDONYM},
        customer_id=17850,
        users_seen=2000,
        user_count=1,
    )
    record = records(stream)[0]
    assert record["user"] == record["user_id"] == log.REDACTED
    assert record["users"] == [log.REDACTED, PSEUDONYM]
    assert record["customer_id"] == log.REDACTED
    assert record["users_seen"] == 2000
    assert record["who"] == {"user": PSEUDONYM}


def test_an_exception_is_one_line_and_its_secret_is_gone(stream: io.StringIO):
    try:
        raise RuntimeError("refused: Bearer hunter2")
    except RuntimeError:
        log.get().exception("failed")
    (record,) = records(stream)
    assert "RuntimeError: refused: Bearer [redacted]" in record["exception"]
