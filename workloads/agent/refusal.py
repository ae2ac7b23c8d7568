"""Why a release is not brought to a site: refused because of what it is, or hindered by what is around it.

A refusal holds until the channel or the operator names something else. What hinders passes: it is tried again, with
growing patience.
"""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - what an agent does with a release, not a mistake of its own
    """A release that must not serve here. `reason` is a fixed word, a metric's label; the text names file and fault."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Hindrance(Exception):  # noqa: N818 - as above
    """The cloud is gone, the disk is full, Triton is away: nothing is said about the release."""
