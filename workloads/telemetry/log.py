"""Log records of every process: one JSON object a line on stderr, nothing secret in any of them.

A record carries `time, level, event, role, site`, the fields of the request being served
(`request_context`) and the caller's own. Records of libraries that log through `logging` (uvicorn,
asyncio) take the same way out. What looks like a key, a token or a person's raw id is replaced
before a record is rendered, wherever in the record it is. This module knows no file and no collector.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from workloads.contract.http import PSEUDONYM_PATTERN

Level = Literal["debug", "info", "warning", "error"]

REDACTED = "[redacted]"

_SECRET_ANYWHERE = frozenset(
    {"secret", "secrets", "password", "passwd", "passphrase", "authorization", "cookie", "credential", "credentials"}
    | {"psk", "jwt"}
)
_SECRET_LAST = frozenset({"key", "keys", "token", "tokens"})
"""Secret as the last word (`pseudonym_key`), harmless before another (`key_epoch`, `token_buckets`)."""
_PERSON = frozenset({"user", "person", "customer", "email"})
_PERSONS = _PERSON | {"users", "persons", "customers", "emails"}

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_PSEUDONYM = re.compile(PSEUDONYM_PATTERN)
_SECRET_TEXT = re.compile(
    r"""(?P<label>\bBearer\ +|\bBasic\ +(?=[A-Za-z0-9+/=]{8})|://[^\s/:@]*:(?=[^\s/@]+@))[^\s@,;"']+
    |\b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    |-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def configure(role: str, site: str, level: Level = "info", stream: TextIO | None = None) -> None:
    """Send every record of this process to `stream` (stderr) from now on; called once, by `__main__`.

    Without a call, structlog's own development defaults hold; the redaction does not.
    """
    out = stream if stream is not None else sys.stderr
    number = logging.getLevelNamesMapping()[level.upper()]
    identity = {"role": role, "site": site}

    def identify(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
        for name, value in identity.items():
            record.setdefault(name, value)
        return record

    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        identify,
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[*chain, _render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *chain],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, _render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)


def get(**fields: object) -> FilteringBoundLogger:
    """A logger whose records all carry `fields`; it follows `configure` even when made before it."""
    logger: FilteringBoundLogger = structlog.get_logger(**fields)
    return logger


def request_context(request_id: str, **fields: object) -> AbstractContextManager[object]:
    """Within it, every record of this task carries the request's id and `fields`."""
    return structlog.contextvars.bound_contextvars(request_id=request_id, **fields)


def redact(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """Structlog processor: replace secrets by name and by form, and raw ids of people.

    A pseudonym (`contract.http.PSEUDONYM_PATTERN`) is no raw id and stays; bytes never pass.
    """
    for name, value in record.items():
        record[name] = _clean(name, value)
    return record


def _clean(name: str, value: object) -> object:
    """`value` without secrets, judged by its name and its form."""
    if value is None or isinstance(value, bool):
        return value
    if _names_secret(name):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(key): _clean(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(name, inner) for inner in value]
    if isinstance(value, int | float):
        return REDACTED if _names_one_person(name) else value  # `user=17850` is an id, `users=2000` a count
    return _clean_text(name, value)


def _clean_text(name: str, value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    text = value if isinstance(value, str) else str(value)
    if _names_person(name) and _PSEUDONYM.fullmatch(text) is None:
        return REDACTED
    return _SECRET_TEXT.sub(lambda found: (found["label"] or "") + REDACTED, text)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _names_secret(name: str) -> bool:
    words = _words(name)
    return bool(words) and (words[-1] in _SECRET_LAST or not _SECRET_ANYWHERE.isdisjoint(words))


def _names_person(name: str) -> bool:
    return not _PERSONS.isdisjoint(_words(name))


def _names_one_person(name: str) -> bool:
    return not _PERSON.isdisjoint(_words(name))


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _render(_: WrappedLogger, __: str, record: EventDict) -> Any:  # noqa: ANN401 - structlog's processor type
    """One JSON object; WriteLogger and logging add the newline."""
    return _encode(record).decode()
