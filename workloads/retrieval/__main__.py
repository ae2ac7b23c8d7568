"""`python -m workloads.retrieval --site NAME --listen H:P --bundle DIR`: be a site's retrieval until SIGTERM."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

from workloads.bundle.store import BundleFault, open_bundle
from workloads.contract.http import PATH_CANDIDATES
from workloads.contract.sites import SiteName
from workloads.retrieval.app import create_app
from workloads.retrieval.dense import ModelFault
from workloads.retrieval.retriever import open_retriever
from workloads.telemetry import log
from workloads.telemetry.metrics import StageMetrics, new_registry
from workloads.telemetry.service import CannotStartError, Service, run


def main() -> int:
    """Exit code: 0 stopped when asked, 2 could not start."""
    parser = argparse.ArgumentParser(prog="python -m workloads.retrieval", description=__doc__)
    parser.add_argument("--site", required=True, choices=[site.value for site in SiteName], help="name of the site")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    parser.add_argument("--bundle", required=True, type=pathlib.Path, metavar="DIR", help="the site's verified copy")
    options = parser.parse_args()

    def build() -> Service:
        metrics = StageMetrics(new_registry())
        begun = time.perf_counter()
        try:
            bundle = open_bundle(options.bundle)
            retriever = open_retriever(bundle, lambda step, ms: metrics.stage(PATH_CANDIDATES, step, ms))
        except (BundleFault, ModelFault, ValueError, OSError) as error:
            raise CannotStartError(str(error), "bring the bundle to this site again: python -m workloads.agent") from (
                error
            )
        log.get(component="retriever").info(
            "bundle opened",
            bundle=bundle.short,
            items=bundle.features.items,
            seconds=round(time.perf_counter() - begun, 3),
        )
        return create_app(retriever, metrics)

    return run("retrieval", options.site, options.listen, build)


if __name__ == "__main__":
    sys.exit(main())
