"""Bringing a bundle into a site's directory: verified, copied, and rendered for its Triton.

What the site serves from is its own copy, so that the place it came from may change or vanish. No
server is asked here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from workloads.agent.injection import Injection
from workloads.agent.repository import SERVED, render_repository
from workloads.bundle.store import copy_bundle
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import Signature


@dataclasses.dataclass(frozen=True)
class Installation:
    """A bundle at a site."""

    bundle: Path
    """The site's own copy."""
    repository: Path
    models: Mapping[str, Signature]
    """Triton name -> signature of each model that the site's Triton serves."""


def install(source: Path, site_directory: Path, site_class: SiteClass, injection: Injection) -> Installation:
    """Verify `source`, copy it to `<site>/bundles/<id>` and render `<site>/triton`. Doing it again changes nothing.

    Raises BundleFault when the bundle is not one that may be opened, ValueError when the site's class
    cannot do what is injected, OSError when the site's directory cannot be written.
    """
    bundle = copy_bundle(source, site_directory / "bundles")
    repository = site_directory / "triton"
    names = render_repository(bundle, repository, site_class, injection)
    return Installation(bundle, repository, dict(zip(names, SERVED, strict=True)))
