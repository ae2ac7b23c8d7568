"""What Pulumi runs: picks the layer by the stack's name."""

from __future__ import annotations

import pulumi


def main() -> None:
    """Declare the current stack's layer; raise ValueError for a name that belongs to none."""
    # Only the layer's own imports: a wrong name, and the other layer's SDK, cost nothing.
    match pulumi.get_stack().partition("-")[0]:
        case "foundation":
            from infra import foundation  # noqa: PLC0415

            foundation.declare()
        case "apps":
            from infra import apps  # noqa: PLC0415

            apps.declare()
        case _:
            raise ValueError(
                f"stack {pulumi.get_stack()}: must be named foundation-<environment> or apps-<environment>"
            )


main()
