"""Every failure as RFC 9457 problem+json: what is at fault, the rule it breaks, and what to do about it.

A problem never repeats a value that it refuses: it may be a person's id. What went wrong inside is
said in a log, not to a client. This module knows no route and no transport.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from workloads.contract.events import ID_PATTERN, UUID7_PATTERN, EventType
from workloads.contract.http import (
    BODY_MAX_BYTES,
    DEADLINE_HEADER,
    DEADLINE_MAX_MS,
    DEADLINE_MIN_MS,
    PRIORITY_HEADER,
    RUNG_HEADER,
    SAMPLE_MAX,
    TENANT_HEADER,
    Problem,
)
from workloads.contract.slo import Priority, Rung

MEDIA_TYPE: Final = "application/problem+json"
TYPES: Final = "/problems/"
"""`type` of a problem is this and a fixed word; clients may switch on it."""

_FIELD_AT_END = re.compile(r"^(?P<what>.*) - at `(?P<path>[^`]*)`$", re.DOTALL)
_NAMED_FIELD = re.compile(r"^Object (?P<what>contains unknown|missing required) field `(?P<name>.*?)`$", re.DOTALL)
_EVENT_RULE = re.compile(r"^(?P<name>[a-z_]+): (?P<rule>.+)$", re.DOTALL)
_QUOTED_VALUE = re.compile(r"^Invalid enum value .*$", re.DOTALL)
_OUTSIDE_JSON = re.compile(rb"[\[,:\s](?:NaN|[-+]?Infinity|nan|inf)\b")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_PLAIN_RULES: Final = {
    f"Expected `str` matching regex {ID_PATTERN!r}": "an id is 1 to 128 characters without control characters",
    f"Expected `str` matching regex {UUID7_PATTERN!r}": "a UUID version 7 (RFC 9562), lower case with hyphens",
    r"Expected `str` matching regex '\\S'": "at least one character that is not white space",
}


class Refused(Exception):  # noqa: N818 - what the gateway does with a request, not a mistake
    """Ends a request with a problem; `headers` go with the answer."""

    def __init__(self, problem: Problem, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(problem.title)
        self.problem = problem
        self.headers = headers


def refused(
    status: int,
    kind: str,
    title: str,
    detail: str,
    *,
    field: str | None = None,
    rule: str | None = None,
    remedy: str | None = None,
    retry_after_s: int | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Refused:
    """A refusal, ready to be raised; with `retry_after_s` it says when to come again (RFC 9110, 10.2.3)."""
    if retry_after_s is not None:
        headers = (*headers, (b"retry-after", b"%d" % retry_after_s))
    problem = Problem(
        type=TYPES + kind, title=title, status=status, detail=detail, field=field, rule=rule, remedy=remedy
    )
    return Refused(problem, headers)


def undecodable(error: Exception, body: bytes) -> Refused:
    """What is wrong with `body`, from the error that decoding it raised: 422 for a field, 400 for no JSON at all."""
    if isinstance(error, msgspec.ValidationError):
        return _invalid_field(str(error))
    if isinstance(error, RecursionError):
        return refused(
            400,
            "too-deep",
            "The body is nested too deeply",
            "the JSON is nested deeper than can be read",
            field="$",
            remedy="send the documented fields; none of them nests",
        )
    if isinstance(error, UnicodeDecodeError):
        why, remedy = f"the body is not UTF-8: {error.reason}", "encode the body as UTF-8"
    elif not body.strip():
        why, remedy = "the body is empty", "send a JSON object; {} asks for all defaults where there are any"
    elif _OUTSIDE_JSON.search(body):
        why, remedy = "NaN and Infinity are no JSON", "send a finite number, or leave the field out"
    elif _SURROGATE.search(body):
        why, remedy = "a \\u escape is half of a surrogate pair", "send both halves, or the character itself as UTF-8"
    else:
        why, remedy = _lower_first(str(error)), "send one complete JSON object (RFC 8259)"
    return refused(400, "not-json", "The body is not JSON", why, field="$", rule="a JSON object", remedy=remedy)


def _invalid_field(message: str) -> Refused:
    """A 422 from msgspec's message, which names the field's path and the rule but for a few kinds no value."""
    located = _FIELD_AT_END.match(message)
    what, path = (located["what"], located["path"]) if located else (message, "$")
    remedy = "see /docs for the fields and their rules"
    if named := _NAMED_FIELD.match(what):
        if named["what"] == "contains unknown":
            detail = f"{path} holds a field that is not known"
            path, rule = f"{path}.{named['name'][:64]}", "no fields but the documented ones"
        else:
            path, rule = f"{path}.{named['name']}", "required"
            detail = f"the field {named['name']!r} is missing"
    elif own := _EVENT_RULE.match(what):
        path, rule = f"{path}.{own['name']}", own["rule"]
        detail = f"{path}: {rule}"
    elif _QUOTED_VALUE.match(what):
        # The only enumeration that a client sends; the message itself quotes the value.
        rule = "one of " + ", ".join(EventType)
        detail = f"{path}: must be {rule}"
    elif what.startswith("Number out of range"):
        rule = "a finite number in range"
        detail = f"{path}: must be {rule}"
    else:
        rule = _PLAIN_RULES.get(what, _lower_first(what))
        detail = f"{path}: {rule}"
    return refused(422, "invalid-field", "A field breaks its rule", detail, field=path, rule=rule, remedy=remedy)


def too_large() -> Refused:
    """413: the body is beyond the limit, declared or met on the way."""
    return refused(
        413,
        "too-large",
        "The body is too large",
        f"the body is larger than {BODY_MAX_BYTES} bytes",
        field="$",
        rule=f"at most {BODY_MAX_BYTES} bytes",
        remedy="send less at once, events in several batches",
        headers=((b"connection", b"close"),),
    )


def too_slow(seconds: float) -> Refused:
    """408: the body did not arrive."""
    return refused(
        408,
        "slow-body",
        "The body did not arrive",
        f"the whole body was not there {seconds:g} s after the headers",
        remedy="send the request again",
        headers=((b"connection", b"close"),),
    )


def wrong_media_type(what: str) -> Refused:
    """415: the body is not declared as what this gateway reads."""
    return refused(
        415,
        "media-type",
        "The body is not declared as JSON",
        what,
        field="Content-Type",
        rule="application/json, in UTF-8, not compressed",
        remedy="send the header 'Content-Type: application/json'",
        headers=((b"accept", b"application/json"),),
    )


def unknown_path(paths: list[str]) -> Refused:
    """404."""
    return refused(
        404,
        "unknown-path",
        "There is nothing here",
        "this path is not served",
        rule="one of " + ", ".join(paths),
        remedy="see /docs",
    )


def wrong_method(allowed: str) -> Refused:
    """405, with the Allow header that RFC 9110 asks for."""
    return refused(
        405,
        "wrong-method",
        "The path does not take this method",
        f"this path takes {allowed}",
        rule=allowed,
        remedy=f"send {allowed}",
        headers=((b"allow", allowed.encode("ascii")),),
    )


def bad_deadline() -> Refused:
    """400: the deadline header cannot be kept."""
    rule = f"a number of milliseconds from {DEADLINE_MIN_MS:g} to {DEADLINE_MAX_MS:g}"
    remedy = "send such a number, or leave the header out for the endpoint's own promise"
    return _bad_header("deadline", DEADLINE_HEADER, rule, remedy)


def bad_priority() -> Refused:
    """400: the priority header names none."""
    return _bad_header("priority", PRIORITY_HEADER, "one of " + ", ".join(Priority))


def bad_tenant() -> Refused:
    """400: the tenant header is no tenant's name. It is not repeated."""
    rule = "1 to 32 lower-case letters, digits or hyphens, the first no hyphen"
    return _bad_header("tenant", TENANT_HEADER, rule)


def bad_rung() -> Refused:
    """400: the rung header names no rung."""
    return _bad_header("rung", RUNG_HEADER, f"a whole number from {min(Rung):d} to {max(Rung):d}")


def _bad_header(what: str, header: str, rule: str, remedy: str | None = None) -> Refused:
    return refused(
        400,
        f"bad-{what}",
        f"The {what} cannot be read",
        f"the header {header} is not {rule}",
        field=header,
        rule=rule,
        remedy=remedy or f"send {rule}, or leave the header out",
    )


def bad_sample_size() -> Refused:
    """422: `?size=`."""
    rule = f"a whole number from 1 to {SAMPLE_MAX}"
    return refused(
        422, "invalid-field", "A parameter breaks its rule", f"size: must be {rule}", field="size", rule=rule
    )


def raw_id(path: str) -> Refused:
    """422: a cloud gateway met what is not a pseudonym. The value is not repeated."""
    return refused(
        422,
        "raw-id",
        "Ids of people do not come here",
        f"{path}: at this site a user is a pseudonym; ids of people stay at home",
        field=path,
        rule="p<key epoch>-<32 hex digits>",
        remedy="send the request to the home gateway, or leave the user out and send `history`",
    )


def not_at_home() -> Refused:
    """403: what is asked of a person's profile is answered at home only."""
    return refused(
        403,
        "not-at-home",
        "Profiles stay at home",
        "this site has no profiles of people and no key to find them by",
        remedy="send the request to the home gateway",
    )


def cannot_forget() -> Refused:
    """503: this gateway maps people, but was not given what forgets them."""
    return refused(
        503,
        "cannot-forget",
        "Nobody can be forgotten here now",
        "this gateway was started without the vault",
        remedy="start it with the vault and send the request again",
    )


def bad_id() -> Refused:
    """422: the id in the path. It is not repeated."""
    rule = _PLAIN_RULES[f"Expected `str` matching regex {ID_PATTERN!r}"]
    return refused(
        422,
        "invalid-field",
        "A parameter breaks its rule",
        f"id: {rule}",
        field="id",
        rule=rule,
        remedy="percent-encode the id as UTF-8 (RFC 3986)",
    )


def no_profiles(retry_after_s: int = 1) -> Refused:
    """503: the store of profiles does not answer."""
    return refused(
        503,
        "no-profiles",
        "Profiles cannot be read now",
        "the store of profiles does not answer; recommendations go on without it",
        remedy=f"try again after {retry_after_s} s",
        retry_after_s=retry_after_s,
    )


def over_share(retry_after_s: int) -> Refused:
    """429: it is crowded, and this tenant has its share."""
    return refused(
        429,
        "over-share",
        "More than this tenant's share",
        "the gateway is crowded, and this tenant has as many requests in it as its share is",
        remedy=f"try again after {retry_after_s} s",
        retry_after_s=retry_after_s,
    )


def overloaded(retry_after_s: int = 1) -> Refused:
    """503: as many requests as the gateway takes at once are in it."""
    return refused(
        503,
        "overloaded",
        "Too many requests at once",
        "the gateway serves as many requests as it takes at once",
        remedy=f"try again after {retry_after_s} s",
        retry_after_s=retry_after_s,
    )


def no_edition(retry_after_s: int = 1) -> Refused:
    """503: the site's agent has brought no bundle yet."""
    return refused(
        503,
        "nothing-served",
        "Nothing is served yet",
        "no bundle has been brought to this site so far",
        remedy=f"try again after {retry_after_s} s; /readyz of the gateway and of the site's agent say what is missing",
        retry_after_s=retry_after_s,
    )


def undecodable_rank(error: Exception) -> Refused:
    """What is wrong with a query for scores: 422 for a field, 400 for no MessagePack at all."""
    if isinstance(error, msgspec.ValidationError):
        return _invalid_field(str(error))
    return refused(400, "not-message-pack", "The body is not MessagePack", str(error), field="$", rule="a RankQuery")


def other_edition(asked: str, served: str) -> Refused:
    """409: the other site asks for scores of an edition that this one does not serve now."""
    return refused(
        409,
        "other-edition",
        "This site serves another edition",
        f"asked was {asked}, served is {served}",
        field="$.bundle",
        rule=f"the edition served here, {served}",
        remedy="rank at home until both sites serve the same",
    )


def bad_tensor(name: str, rule: str) -> Refused:
    """422: an input of the ranker is not what the contract says."""
    return refused(
        422,
        "invalid-field",
        "A field breaks its rule",
        f"$.{name}: {rule}",
        field=f"$.{name}",
        rule=rule,
        remedy="send the inputs of `tensors.RANKER`, row by row",
    )


def not_message_pack() -> Refused:
    """415: ranking for another site speaks MessagePack."""
    return refused(
        415,
        "media-type",
        "The body is not declared as MessagePack",
        "the header Content-Type names something else, or nothing",
        field="Content-Type",
        rule="application/msgpack",
        remedy="send the header 'Content-Type: application/msgpack'",
        headers=((b"accept", b"application/msgpack"),),
    )


def no_ranking(why: str, retry_after_s: int = 1) -> Refused:
    """503: this site's ranker gives the other site no scores now."""
    return refused(
        503,
        "no-ranking",
        "Nothing is ranked for others now",
        why,
        remedy="rank at home, or answer from the student",
        retry_after_s=retry_after_s,
    )


def not_acknowledged(why: str, retry_after_s: int = 1) -> Refused:
    """503: the events are not known to be on disk; sending them again is safe, they carry their ids."""
    return refused(
        503,
        "not-acknowledged",
        "The events are not acknowledged",
        why,
        remedy="send the same events again; those that are on disk already are counted as duplicates",
        retry_after_s=retry_after_s,
    )


def slow_down(why: str, retry_after_s: int) -> Refused:
    """429: home has no room for more events now; none of these was stored."""
    return refused(
        429,
        "slow-down",
        "Too many events for now",
        why,
        remedy=f"send the same events again after {retry_after_s} s",
        retry_after_s=retry_after_s,
    )


def not_forgotten(retry_after_s: int = 1) -> Refused:
    """503: it is not known to be on disk that a person is to be forgotten; asking again is safe."""
    return refused(
        503,
        "not-forgotten",
        "The person is not forgotten yet",
        "It cannot be written down now",
        remedy="ask again; nothing is lost by asking twice",
        retry_after_s=retry_after_s,
    )


def broken() -> Refused:
    """500: our fault; the log has it under the request's id."""
    return refused(
        500,
        "broken",
        "The gateway failed",
        "an unexpected fault; it is in the gateway's log under this request's id",
        remedy="try again; tell the operator if it stays",
    )


def _lower_first(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]  # "JSON is malformed" stays
