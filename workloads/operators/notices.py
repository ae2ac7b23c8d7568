"""What AWS announces about instances: notices as EventBridge sends them, the queue they come in, the hook to answer.

Sources: EC2 User Guide, "Spot Instance interruption notices" and "rebalance recommendations"; EC2 Auto Scaling User
Guide, "EventBridge event reference" (terminate lifecycle action).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import re
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

_INSTANCE: Final = re.compile(r"i-[0-9a-f]{8,17}")
_TERMINATING: Final = "autoscaling:EC2_INSTANCE_TERMINATING"
_TOKEN_LENGTH: Final = 36
"""Auto Scaling takes no other back."""


class Kind(enum.StrEnum):
    """What is announced; the value is the event's `detail-type`."""

    INTERRUPTION = "EC2 Spot Instance Interruption Warning"
    REBALANCE = "EC2 Instance Rebalance Recommendation"
    TERMINATING = "EC2 Instance-terminate Lifecycle Action"

    @property
    def label(self) -> str:
        """As metrics and logs call it."""
        return self.name.lower()


@dataclasses.dataclass(frozen=True)
class Hook:
    """The lifecycle action that Auto Scaling waits for."""

    group: str
    name: str
    token: str


@dataclasses.dataclass(frozen=True)
class Notice:
    """One announcement."""

    kind: Kind
    instance: str
    at: float
    """When AWS sent it, in seconds since 1970."""
    hook: Hook | None = None


class PoisonError(ValueError):
    """A message that is no notice; it will be none the next time either."""


class _Detail(msgspec.Struct):
    instance_id: str | None = msgspec.field(name="instance-id", default=None)
    ec2_instance_id: str | None = msgspec.field(name="EC2InstanceId", default=None)
    group: str | None = msgspec.field(name="AutoScalingGroupName", default=None)
    hook: str | None = msgspec.field(name="LifecycleHookName", default=None)
    token: str | None = msgspec.field(name="LifecycleActionToken", default=None)
    transition: str | None = msgspec.field(name="LifecycleTransition", default=None)


class _Event(msgspec.Struct):
    kind: Kind = msgspec.field(name="detail-type")
    time: datetime.datetime
    detail: _Detail


def read(body: str) -> Notice:
    """The notice in a message's body. Raises PoisonError for anything else."""
    try:
        event = msgspec.json.decode(body, type=_Event)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise PoisonError(str(error)) from None
    if event.time.tzinfo is None:
        raise PoisonError(f"the time {event.time} has no zone")
    detail, hook = event.detail, None
    instance = detail.instance_id
    if event.kind is Kind.TERMINATING:
        if not (detail.group and detail.hook and detail.token) or detail.transition != _TERMINATING:
            raise PoisonError("a lifecycle action without its group, hook and token, or of another transition")
        if len(detail.token) != _TOKEN_LENGTH:
            raise PoisonError(f"a lifecycle action's token of {len(detail.token)} characters")
        hook, instance = Hook(detail.group, detail.hook, detail.token), detail.ec2_instance_id
    if instance is None or _INSTANCE.fullmatch(instance) is None:
        raise PoisonError(f"no instance id: {instance!r:.40}")
    return Notice(event.kind, instance, event.time.timestamp(), hook)


@dataclasses.dataclass(frozen=True)
class Message:
    """One delivery from the queue."""

    id: str
    receipt: str = dataclasses.field(repr=False)
    body: str = dataclasses.field(repr=False)
    received: int = 1
    """How often it was delivered, this time included."""


class Notices(Protocol):
    """The queue; every method raises `cloud.CloudFault`."""

    def receive(self, wait_s: int, hold_s: int) -> Sequence[Message]:
        """Messages, after `wait_s` at most; nobody else gets them for `hold_s`."""
        ...

    def hold(self, message: Message, seconds: int) -> None:
        """Keep a message from others for so long from now."""
        ...

    def done(self, message: Message) -> None:
        """Delete it."""
        ...


class Hooks(Protocol):
    """Lifecycle actions of Auto Scaling; both methods raise `cloud.CloudFault`. An action that is over is no fault."""

    def beat(self, instance: str, hook: Hook) -> None:
        """Ask Auto Scaling to wait on."""
        ...

    def complete(self, instance: str, hook: Hook) -> None:
        """Let the instance go."""
        ...


class MemoryNotices:
    """A queue in memory: what is received and not done can be received again after `expire`."""

    def __init__(self, *bodies: str) -> None:
        self.waiting = [Message(f"m{n}", f"r{n}", body) for n, body in enumerate(bodies)]
        self.taken: dict[str, Message] = {}
        self.deleted: list[str] = []
        self.held: list[tuple[str, int]] = []

    def receive(self, wait_s: int, hold_s: int) -> Sequence[Message]:  # noqa: ARG002 - time passes by `expire` alone
        """See Notices."""
        given, self.waiting = self.waiting, []
        self.taken |= {message.id: message for message in given}
        return given

    def hold(self, message: Message, seconds: int) -> None:
        """See Notices."""
        self.held.append((message.id, seconds))

    def done(self, message: Message) -> None:
        """See Notices."""
        self.taken.pop(message.id, None)
        self.deleted.append(message.id)

    def expire(self) -> None:
        """What was taken and not done comes back."""
        self.waiting += [dataclasses.replace(m, received=m.received + 1) for m in self.taken.values()]
        self.taken = {}


class MemoryHooks:
    """Remembers what was asked; `fault` is raised instead."""

    def __init__(self) -> None:
        self.beats: list[tuple[str, Hook]] = []
        self.completed: list[tuple[str, Hook]] = []
        self.fault: Exception | None = None

    def beat(self, instance: str, hook: Hook) -> None:
        """See Hooks."""
        self._asked()
        self.beats.append((instance, hook))

    def complete(self, instance: str, hook: Hook) -> None:
        """See Hooks."""
        self._asked()
        self.completed.append((instance, hook))

    def _asked(self) -> None:
        if self.fault is not None:
            raise self.fault
