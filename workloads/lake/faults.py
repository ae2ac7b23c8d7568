"""Why a lake cannot do what was asked of it."""

from __future__ import annotations


class LakeError(ValueError):
    """A lake, or a request to it, that cannot be used: the fault in one sentence, the remedy in another."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class LakeBusyError(LakeError):
    """Another process has been writing the lake for longer than this one would wait."""


class LakeChangedError(LakeError):
    """Files went away while they were read, by an erasure or after the grace period."""
