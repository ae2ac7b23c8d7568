"""What Pulumi runs: picks the layer by the stack's name."""

from __future__ import annotations

import pulumi


def main() -> None:
    """Declare the current stack's layer; raise ValueError for a name that belongs to none."""
    layer = pulumi.get_stack().partition("-")[0]
    if layer != "foundation":
        raise ValueError(f"stack {pulumi.get_stack()}: must be named foundation-<environment>")
    # Only now: a wrong name costs no import of the providers' SDKs.
    from infra import foundation  # noqa: PLC0415

    foundation.declare()


main()
