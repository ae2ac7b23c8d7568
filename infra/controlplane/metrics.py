"""Plays a server of external metrics behind the API server: says what it is told to say, and to nobody else.

The API server aggregates it (an APIService), so the autoscaler of pods asks it as it would ask KEDA's adapter. Callers
must show a certificate that the front proxy's CA signed.

Source: Kubernetes documentation, "Configure the Aggregation Layer"; k8s.io/metrics, external_metrics/v1beta1.
"""

from __future__ import annotations

import base64
import datetime
import json
import ssl
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from infra.controlplane.api import Manifest
from infra.controlplane.credentials import serving_pair

GROUP_VERSION: Final = "external.metrics.k8s.io/v1beta1"
NAMESPACE: Final = "external-metrics"
SERVICE: Final = "external-metrics"


class ExternalMetrics:
    """A server on loopback while it is open; `values` maps a metric's name to its quantity, e.g. `5` or `2500m`."""

    def __init__(self, folder: Path, front_proxy_ca: Path) -> None:
        self.values: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        """(namespace, metric) of every question."""
        certificate, key, self._ca = serving_pair(folder, SERVICE, (f"{SERVICE}.{NAMESPACE}.svc",))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(front_proxy_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="external-metrics", daemon=True)

    def __enter__(self) -> ExternalMetrics:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def manifests(self) -> list[Manifest]:
        """What tells the API server of it. An ExternalName, because no endpoint may lie on loopback."""
        return [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": SERVICE, "namespace": NAMESPACE},
                "spec": {"type": "ExternalName", "externalName": "localhost"},
            },
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
                "spec": {
                    "group": "external.metrics.k8s.io",
                    "version": "v1beta1",
                    "service": {"name": SERVICE, "namespace": NAMESPACE, "port": self._server.server_address[1]},
                    "caBundle": base64.b64encode(self._ca).decode(),
                    "groupPriorityMinimum": 100,
                    "versionPriority": 100,
                },
            },
        ]

    def answer(self, path: str) -> dict[str, Any] | None:
        """The document at a path, None where there is none."""
        parts = urllib.parse.urlsplit(path).path.strip("/").split("/")
        if parts == ["apis", *GROUP_VERSION.split("/")]:
            metric = {"name": "*", "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList"}
            resources = [{**metric, "verbs": ["get"]}]
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": GROUP_VERSION,
                "resources": resources,
            }
        if parts[:3] == ["apis", *GROUP_VERSION.split("/")] and len(parts) == 6:
            namespace, metric_name = parts[4], parts[5]
            self.asked.append((namespace, metric_name))
            if metric_name not in self.values:
                return None
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            value = {"metricName": metric_name, "metricLabels": {}, "timestamp": now, "value": self.values[metric_name]}
            return {"kind": "ExternalMetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": [value]}
        return None


def _handler(metrics: ExternalMetrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            document = metrics.answer(self.path)
            body = json.dumps(document or {"kind": "Status", "status": "Failure", "code": 404}).encode()
            self.send_response(200 if document else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's
            """Quiet: the autoscaler asks every few seconds."""

    return Handler
