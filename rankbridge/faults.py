"""What the desk says when it cannot go on, and the exit codes that scripts rely on. Knows no terminal."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a `rankbridge` command ended."""

    OK = 0
    VERDICT_FAILED = 1
    """The run was done and measured, and a budget did not hold."""
    BAD_INPUT = 2
    """Something the user can mend: input, a busy port, a missing tool, a process that did not come up."""
    NOT_READY = 3
    """`status`: something is down or not ready."""
    INTERRUPTED = 130
    TERMINATED = 143


class DeskError(Exception):
    """A fault and its remedy, one line each; `detail` is evidence (the last lines of a log)."""

    def __init__(
        self,
        fault: str,
        remedy: str,
        *,
        detail: tuple[str, ...] = (),
        code: ExitCode = ExitCode.BAD_INPUT,
    ) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy
        self.detail = detail
        self.code = code


class ManyFaults(DeskError):  # noqa: N818 - it is several, and each is a DeskError
    """All that is wrong, in one message: nobody wants to find faults one run at a time."""

    def __init__(self, faults: list[DeskError]) -> None:
        super().__init__(
            "; ".join(fault.fault for fault in faults),
            "; ".join(dict.fromkeys(fault.remedy for fault in faults)),
        )
        self.faults = tuple(faults)
