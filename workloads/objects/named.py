"""What stands in AWS in place of its value: a bucket's name in SSM, a password in Secrets Manager.

`ssm:/rankbridge/prod/buckets#models` is the entry `models` of the JSON in that parameter, which the foundation writes;
without `#` it is the whole text. `secretsmanager:NAME` is the text of a secret. Anything else is its own value.
Endpoint, region and credentials are the standard AWS configuration's. A name that is not there is Denied and never
NotFound: that there is no bucket must not read as that there is no object.
"""

from __future__ import annotations

from typing import Any, Final

import boto3
import msgspec
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)

from workloads.objects.store import Denied, Unavailable

PARAMETER: Final = "ssm:"
SECRET: Final = "secretsmanager:"  # noqa: S105 - what stands before a secret's name
CONFIGURED: Final = "check AWS_PROFILE or the credentials, AWS_REGION and, for another endpoint, AWS_ENDPOINT_URL"
NOT_CONFIGURED: Final = (
    CredentialRetrievalError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
"""What botocore says where who we are, or where, is not configured, or the program that was to tell failed."""

_ATTEMPTS: Final = 4
_CONNECT_S: Final = 5.0
_READ_S: Final = 10.0
_MISSING: Final = frozenset({"ParameterNotFound", "ResourceNotFoundException"})
_REFUSED: Final = frozenset({401, 403})
_REFUSALS: Final = frozenset({"AccessDeniedException", "UnrecognizedClientException", "ExpiredTokenException"})


def bucket_name(named: str) -> str:
    """The name of a bucket that may be given as `ssm:PARAMETER#ENTRY`. Raises ObjectsError."""
    if not named.startswith(PARAMETER):
        return named
    parameter, _, entry = named.removeprefix(PARAMETER).partition("#")
    asked = {"Name": parameter, "WithDecryption": True}
    value = str(_asked("ssm", "get_parameter", f"the parameter {parameter}", asked)["Parameter"]["Value"])
    if not entry:
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, str])[entry]
    except (msgspec.DecodeError, KeyError):
        raise Denied(f"the parameter {parameter} has no entry {entry!r}", "name one of the JSON there") from None


def password(named: str | None) -> str | None:
    """A password that may be given as `secretsmanager:NAME`; None stays None. Raises ObjectsError, never showing it."""
    if named is None or not named.startswith(SECRET):
        return named
    name = named.removeprefix(SECRET)
    answer = _asked("secretsmanager", "get_secret_value", f"the secret {name}", {"SecretId": name})
    if "SecretString" not in answer:
        raise Denied(f"the secret {name} holds bytes, not text", "store the password as text")
    return str(answer["SecretString"])


def _asked(service: str, call: str, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer to one call. Raises Denied, Unavailable."""
    try:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
        )
        client: Any = boto3.session.Session().client(service, config=config)  # type: ignore[call-overload]  # S3's stubs only
        answer: dict[str, Any] = getattr(client, call)(**arguments)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _MISSING:
            remedy = "name the right one, or bring up the foundation"
            raise Denied(f"{what} is not in this account and region", remedy) from None
        if status in _REFUSED or code in _REFUSALS:
            raise Denied(f"cannot read {what}: {code}", "check the role's rights for it and for its key") from None
        raise Unavailable(f"cannot read {what}: {code or status}") from None
    except (*NOT_CONFIGURED, ValueError) as error:
        raise Denied(f"cannot read {what}: {error}", CONFIGURED) from None
    except (BotoCoreError, OSError) as error:
        raise Unavailable(f"cannot read {what}: {error}") from None
    return answer
