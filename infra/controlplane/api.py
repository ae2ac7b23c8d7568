"""Speaks to an API server in plain manifests: what `kubectl apply --server-side`, `get`, `watch` and `drain` send.

Every manifest goes out exactly as it was declared and with strict validation, so that a field that Kubernetes does not
know is an error and not lost on the way, as it would be in a typed client. It knows no kind in advance: the server
says which path a kind has.

Sources: Kubernetes documentation, "Server-Side Apply", "API-initiated Eviction" and "Kubernetes API Concepts".
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

Manifest = Mapping[str, Any]


class RefusedError(RuntimeError):
    """The API server said no; `status` is HTTP's, `reason` Kubernetes' own."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(f"{status} {reason}: {message}")


class Api:
    """One API server as the user of a kubeconfig sees it."""

    def __init__(self, kubeconfig: Path) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._http = httpx.Client(
            base_url=cluster["server"],
            verify=context,
            headers={"Authorization": f"Bearer {user['token']}"},
            timeout=30,
            trust_env=False,
        )
        self._kinds: dict[tuple[str, str], tuple[str, bool]] = {}

    def __enter__(self) -> Api:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its connections."""
        self._http.close()

    def apply(self, manifest: Manifest, *, manager: str = "rankbridge", status: bool = False) -> dict[str, Any]:
        """Server-side apply, strictly validated; the object as the server keeps it. Raises RefusedError."""
        metadata = manifest["metadata"]
        path = self.path(manifest["apiVersion"], manifest["kind"], metadata.get("namespace", ""), metadata["name"])
        answer = self._http.patch(
            path + ("/status" if status else ""),
            params={"fieldManager": manager, "fieldValidation": "Strict", "force": "true"},
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(manifest),
        )
        return _read(answer)

    def get(self, api_version: str, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
        """One object. Raises RefusedError (404 where there is none)."""
        return _read(self._http.get(self.path(api_version, kind, namespace, name)))

    def find(self, api_version: str, kind: str, namespace: str = "", selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind, of all namespaces unless one is named."""
        found = _read(self._http.get(self.path(api_version, kind, namespace), params={"labelSelector": selector}))
        return [{"apiVersion": api_version, "kind": kind, **item} for item in found["items"]]

    def patch(self, api_version: str, kind: str, name: str, namespace: str, change: Manifest) -> dict[str, Any]:
        """A merge patch."""
        return _read(
            self._http.patch(
                self.path(api_version, kind, namespace, name),
                headers={"Content-Type": "application/merge-patch+json"},
                content=json.dumps(change),
            )
        )

    def delete(self, api_version: str, kind: str, name: str, namespace: str = "") -> None:
        """Delete what may be gone already, and what hangs on it in the background. Raises RefusedError."""
        path = self.path(api_version, kind, namespace, name)
        answer = self._http.delete(path, params={"propagationPolicy": "Background"})
        if answer.status_code != httpx.codes.NOT_FOUND:
            _read(answer)

    def evict(self, name: str, namespace: str) -> bool:
        """Ask for a pod's eviction; False where a disruption budget does not allow it now. Raises RefusedError."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
        }
        answer = self._http.post(self.path("v1", "Pod", namespace, name) + "/eviction", json=body)
        if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return False
        if answer.status_code != httpx.codes.NOT_FOUND:
            _read(answer)
        return True

    def watch(
        self, api_version: str, kind: str, namespace: str = "", *, seconds: int = 1_200
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes of a kind, as (ADDED|MODIFIED|DELETED, object); what is there already comes first, as ADDED.

        Ends after `seconds`, or when the server goes. Raises RefusedError.
        """
        query = {"watch": "true", "timeoutSeconds": str(seconds)}
        path = self.path(api_version, kind, namespace)
        with (
            contextlib.suppress(httpx.TransportError),
            self._http.stream("GET", path, params=query, timeout=httpx.Timeout(30, read=seconds + 5)) as answer,
        ):
            if answer.is_error:
                answer.read()
                _read(answer)
            for event in map(json.loads, answer.iter_lines()):
                yield event["type"], event["object"]

    def path(self, api_version: str, kind: str, namespace: str = "", name: str = "") -> str:
        """The URL path of a kind or object. Raises RefusedError for a kind that the server does not have."""
        root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
        if (api_version, kind) not in self._kinds:
            for resource in _read(self._http.get(root))["resources"]:
                if "/" not in resource["name"]:
                    self._kinds[api_version, resource["kind"]] = (resource["name"], resource["namespaced"])
        if (api_version, kind) not in self._kinds:
            raise RefusedError(404, "NotFound", f"the server has no {kind} in {api_version}")
        plural, namespaced = self._kinds[api_version, kind]
        parts = [root]
        if namespaced and (namespace or name):
            parts += ["namespaces", namespace or "default"]
        parts += [plural, *([name] if name else [])]
        return "/".join(parts)


def documents(paths: Sequence[Path]) -> list[Manifest]:
    """The manifests in YAML files."""
    return [document for path in paths for document in yaml.safe_load_all(path.read_text()) if document]


def _read(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        try:
            said = answer.json()
        except ValueError:
            said = {"reason": answer.reason_phrase, "message": answer.text[:500]}
        raise RefusedError(answer.status_code, said.get("reason", ""), said.get("message", ""))
    read: dict[str, Any] = answer.json()
    return read
