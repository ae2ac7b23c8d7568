"""`python -m infra.controlplane build|run`: make the commands, or run a control plane until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.controlplane import ROOT, ControlPlane, ControlPlaneError
from infra.controlplane.build import build


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; exit code 1 and a line when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m infra.controlplane", description="Kubernetes on this machine")
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("--home", type=Path, default=ROOT / ".rankbridge" / "controlplane", help="where state is kept")
    options = parser.parse_args(arguments)
    try:
        if options.action == "build":
            build(_say)
            return 0
        plane = ControlPlane(options.home)
        took = plane.start()
    except ControlPlaneError as error:
        _say(str(error))
        return 1
    _say(f"up after {took:.1f} s; export KUBECONFIG={plane.kubeconfig}   (Ctrl-C ends it)")
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except KeyboardInterrupt:
        pass
    finally:
        plane.stop()
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
