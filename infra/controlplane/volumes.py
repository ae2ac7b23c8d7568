"""Plays the provisioner of volumes (k3s: local-path): a claim that a pod waits with gets a volume on the pod's node.

The scheduler picks the node and writes it onto the claim, as for a real provisioner; nothing is ever written to such
a volume.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Final

import httpx

from infra.controlplane.api import Api, Manifest, RefusedError

SELECTED: Final = "volume.kubernetes.io/selected-node"
POLL_S: Final = 0.2


def storage_class(name: str) -> Manifest:
    """The class that k3s brings: a directory of the node where the first pod is put."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": "rancher.io/local-path",
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Delete",
    }


class Provisioner:
    """A thread that answers claims while it is open."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="provisioner", daemon=True)

    def __enter__(self) -> Provisioner:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End, and wait for it."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(POLL_S):
            try:
                for claim in self._api.find("v1", "PersistentVolumeClaim"):
                    node = claim["metadata"].get("annotations", {}).get(SELECTED)
                    if node and not claim["spec"].get("volumeName"):
                        self._api.apply(_volume(claim, node))
            except (RefusedError, httpx.TransportError):
                continue  # the next look is soon; a claim that never binds leaves its pod pending, which is seen


def _volume(claim: dict[str, Any], node: str) -> Manifest:
    metadata, spec = claim["metadata"], claim["spec"]
    matching = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"pvc-{metadata['uid']}"},
        "spec": {
            "accessModes": spec["accessModes"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "hostPath": {"path": f"/var/lib/rancher/k3s/storage/pvc-{metadata['uid']}"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [matching]}},
            "storageClassName": spec["storageClassName"],
            "persistentVolumeReclaimPolicy": "Delete",
        },
    }
