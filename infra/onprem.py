"""The private k3s cluster: servers with embedded etcd one after the other, then agents, over SSH.

The script of a host goes through stdin, because it holds the join tokens: no secret is in a command line, and nothing
that a host prints is logged. Destroying the stack leaves the hosts as they are; taking a host out is an operator's
decision (docs/foundation.md). What is installed is `infra.cluster`'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import pulumi
import pulumi_command as command
from pulumi import Output, ResourceOptions

from infra import cluster
from infra.cluster import File
from infra.config import FoundationConfig, Host, HostRole

KUBECONFIG: Final = "/etc/rancher/k3s/k3s.yaml"


@dataclasses.dataclass(frozen=True)
class OnPremArgs:
    """What the private cluster is made from. Tokens and the SSH key are secrets."""

    config: FoundationConfig
    server_token: Output[str]
    agent_token: Output[str]
    ssh_private_key: Output[str] | None
    """None without hosts."""
    server_files: Output[list[File]]
    """Further files of servers, such as those of the snapshot copies."""


class OnPrem(pulumi.ComponentResource):
    """k3s on every private host; `kubeconfig` is None where there are no hosts."""

    def __init__(self, name: str, args: OnPremArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:onprem:Cluster", name, None, opts)
        self._args = args
        self.kubeconfig: Output[str] | None = None
        servers: list[pulumi.Resource] = []
        for host in args.config.onprem.servers:
            # One at a time: etcd takes one new member after the other.
            servers.append(self._install(host, servers[-1:]))
        for host in args.config.onprem.agents:
            self._install(host, servers)
        if servers:
            first = args.config.onprem.servers[0]
            read = command.remote.Command(
                "kubeconfig",
                connection=self._connection(first),
                create=f"sudo -n cat {KUBECONFIG}",
                logging=command.remote.Logging.NONE,
                # Or an update would hand the old kubeconfig to the next shell as an environment variable.
                add_previous_output_in_env=False,
                triggers=[args.config.k3s.version, str(args.config.k3s.api)],
                opts=ResourceOptions(
                    parent=self, depends_on=servers[:1], additional_secret_outputs=["stdout", "stderr"]
                ),
            )
            self.kubeconfig = self._reachable(read)
        self.register_outputs({})

    def _reachable(self, read: command.remote.Command) -> Output[str]:
        config = self._args.config
        return Output.secret(read.stdout.apply(lambda text: cluster.kubeconfig(text, config)))

    def _connection(self, host: Host) -> command.remote.ConnectionArgs:
        onprem = self._args.config.onprem
        return command.remote.ConnectionArgs(
            host=str(host.address),
            user=onprem.ssh_user,
            private_key=self._args.ssh_private_key,
            host_key=onprem.ssh_host_keys.get(host.name),
            dial_error_limit=10,
        )

    def _install(self, host: Host, after: Sequence[pulumi.Resource]) -> command.remote.Command:
        args = self._args

        def script(values: Sequence[object]) -> str:
            server_token, agent_token, extra = values
            secrets = [File(cluster.AGENT_TOKEN, str(agent_token))]
            if host.role is HostRole.SERVER:
                secrets.append(File(cluster.SERVER_TOKEN, str(server_token)))
            files = extra if host.role is HostRole.SERVER and isinstance(extra, list) else []
            return cluster.host_script(args.config, host, secrets, files)

        inputs: list[Any] = [args.server_token, args.agent_token, args.server_files]
        text: Output[str] = Output.all(*inputs).apply(script)
        hidden: Output[str] = Output.secret(text)
        return command.remote.Command(
            host.name,
            connection=self._connection(host),
            # Runs again, on the same resource, whenever the script changes; it restarts k3s only if it must.
            create="sudo -n sh -s",
            stdin=hidden,
            logging=command.remote.Logging.NONE,
            add_previous_output_in_env=False,
            opts=ResourceOptions(
                parent=self, depends_on=list(after), additional_secret_outputs=["stdout", "stderr", "stdin"]
            ),
        )
