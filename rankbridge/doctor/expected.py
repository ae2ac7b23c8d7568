"""What the plan says of the way between the sites: sizes from cipher and overlay, tunnels, names to resolve.

Read from a foundation's stack file, or taken from a plan at hand. It measures nothing, and needs no secret.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from pathlib import Path

import yaml

from infra import config, stackfile
from infra.plan import FaultsError
from infra.vpn import plan as vpn
from rankbridge.doctor.findings import Finding, fault, ok
from rankbridge.faults import DeskError

_SECRETS = ("rankbridge:psk-", "rankbridge:k3s-", "rankbridge:ssh-")


@dataclasses.dataclass(frozen=True)
class Expected:
    """Sizes in bytes; packets are IPv4 packets inside a tunnel unless they are called outer."""

    mtu: int
    """The largest packet that the plan lets into a tunnel."""
    path_mtu: int
    """The largest outer packet that the plan counts on."""
    nat_traversal: bool
    peers: tuple[IPv4Address, ...]
    """Whom the private router speaks BGP with: the inside addresses of all tunnels."""
    names: tuple[str, ...] = ()
    """Names that both sites must be able to resolve."""

    @classmethod
    def of_stack(cls, stack: str) -> Expected:
        """From a foundation's name, or the path of its file. Raises DeskError."""
        path = Path(stack)
        directory = path.parent if path.suffix == ".yaml" else stackfile.STACKS
        name = path.name.removeprefix("Pulumi.").removesuffix(".yaml")
        try:
            values = stackfile.values(name, directory)
        except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
            known = ", ".join(sorted(one.name[7:-5] for one in stackfile.STACKS.glob("Pulumi.foundation-*.yaml")))
            raise DeskError(
                f"no foundation's stack file can be read as {stack}: {error}", f"one of {known}, or a file's path"
            ) from error
        plain = {key: value for key, value in values.items() if not key.startswith(_SECRETS)}
        try:
            return cls._of_config(config.read(name, *_with_stand_ins(name, plain)))
        except FaultsError as error:
            raise DeskError(
                f"{stack}: {error}", "mend the stack file: what is checked here is deployed from it"
            ) from None

    @classmethod
    def _of_config(cls, read: config.FoundationConfig) -> Expected:
        regions = sorted({cloud.site.region for cloud in read.clouds})
        return cls(
            mtu=read.vpn.transport.mtu,
            path_mtu=read.network.path_mtu,
            nat_traversal=read.vpn.nat_traversal,
            peers=tuple(tunnel.aws_inside for link in read.links for tunnel in link.tunnels),
            names=()
            if read.emulator
            else tuple(f"{name}.{region}.amazonaws.com" for region in regions for name in ("s3", "sts")),
        )

    @property
    def mss(self) -> int:
        """The largest TCP segment."""
        return vpn.clamp_mss(self.mtu)

    def outer(self, size: int) -> int:
        """The smallest outer packet that carries an inner one of `size`."""
        outer = size
        while vpn.tunnel_mtu(outer, nat_traversal=self.nat_traversal) < size:
            outer += 1
        return outer


def _with_stand_ins(stack: str, values: dict[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """The values with worthless secrets for those that are asked for: what is read of them is thrown away."""
    try:
        config.read(stack, values)
    except FaultsError as error:
        missing = [
            one.key for one in error.faults if one.value == "nothing" and f"rankbridge:{one.key}".startswith(_SECRETS)
        ]
        secrets = {f"rankbridge:{key}": value for key, value in stackfile.sample_secrets(missing).items()}
        return values | secrets, frozenset(secrets)
    return values, frozenset()


def sizes(expected: Expected) -> Finding:
    """Whether the plan agrees with itself: its packets must fit the outer ones with what the cipher adds."""
    largest = min(vpn.tunnel_mtu(expected.path_mtu, nat_traversal=expected.nat_traversal), vpn.AWS_MTU)
    measured = f"mtu {expected.mtu}, MSS {expected.mss}, pods {vpn.pod_mtu(expected.mtu)}"
    how = f"at most {largest} in outer packets of {expected.path_mtu}"
    if expected.mtu <= largest:
        return ok("plan", measured, how)
    return fault("plan", measured, how, f"lower `network.mtu` in the stack file to {largest}")
