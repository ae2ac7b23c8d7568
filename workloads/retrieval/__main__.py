"""`python -m workloads.retrieval --site NAME --listen H:P --editions FILE`: be a site's retrieval until SIGTERM.

It holds what the site's agent writes into the file; with `--bundle DIR`, that one bundle for ever.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time

from workloads.bundle.site import EditionsWatch, SiteDirectory
from workloads.bundle.store import Bundle, BundleFault, open_bundle
from workloads.contract.http import PATH_CANDIDATES
from workloads.contract.sites import site_name
from workloads.retrieval.app import create_app
from workloads.retrieval.dense import ModelFault
from workloads.retrieval.editions import Editions, follow
from workloads.retrieval.retriever import Retriever, open_retriever
from workloads.telemetry import log
from workloads.telemetry.beside import settle
from workloads.telemetry.metrics import StageMetrics, new_registry
from workloads.telemetry.service import CannotStartError, Service, run


def main() -> int:
    """Exit code: 0 stopped when asked, 2 could not start."""
    parser = argparse.ArgumentParser(prog="python -m workloads.retrieval", description=__doc__)
    parser.add_argument("--site", required=True, type=site_name, metavar="NAME", help="name of the site")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument(
        "--editions", type=pathlib.Path, metavar="FILE", help="the site's editions.json, written by its agent"
    )
    served.add_argument("--bundle", type=pathlib.Path, metavar="DIR", help="one verified bundle, for ever")
    options = parser.parse_args()

    def build() -> Service:
        metrics = StageMetrics(new_registry())
        editions = Editions(metrics.registry)

        def opened(bundle: Bundle) -> Retriever:
            return open_retriever(bundle, lambda step, ms: metrics.stage(PATH_CANDIDATES, step, ms))

        if options.editions is not None:
            directory = SiteDirectory(options.editions.absolute().parent)
            watch = EditionsWatch(options.editions)
            settle()
            return create_app(
                editions,
                metrics,
                functools.partial(follow, editions, watch, lambda edition: opened(directory.open(edition))),
            )
        begun = time.perf_counter()
        try:
            bundle = open_bundle(options.bundle)
            editions.hold(opened(bundle))
        except (BundleFault, ModelFault, ValueError, OSError) as error:
            raise CannotStartError(str(error), "bring the bundle to this site again: python -m workloads.agent") from (
                error
            )
        settle()
        log.get(component="retriever").info(
            "bundle opened",
            bundle=bundle.short,
            items=bundle.features.items,
            seconds=round(time.perf_counter() - begun, 3),
        )
        return create_app(editions, metrics)

    return run("retrieval", options.site, options.listen, build)


if __name__ == "__main__":
    sys.exit(main())
