"""Draws a recorded foundation as one SVG: sites, tunnels, node groups, buckets.

Everything in the picture is read from the recorded resources; what is not declared is not drawn. Text only: no font,
image or script is loaded. Colours are readable on a light and on a dark page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from infra.recording import Recorded, Recording

WIDTH: Final = 1_080
_LINE: Final = 20
_PAD: Final = 16
_STYLE: Final = """
  text { font: 13px system-ui, sans-serif; fill: #1f2937 }
  .title { font-weight: 600; font-size: 15px }
  .store + .title { font-size: 13px }
  .small { font-size: 12px; fill: #4b5563 }
  .site { fill: #f8fafc; stroke: #64748b; stroke-width: 1.5 }
  .part { fill: #ffffff; stroke: #94a3b8 }
  .gpu { fill: #ecfdf5; stroke: #059669 }
  .store { fill: #eff6ff; stroke: #2563eb }
  .tunnel { stroke: #b45309; stroke-width: 2.5; fill: none }
  .joins { stroke: #64748b; stroke-dasharray: 5 4; fill: none }
"""


@dataclasses.dataclass(frozen=True)
class Box:
    """A box with a title and lines of text."""

    x: int
    y: int
    width: int
    title: str
    lines: Sequence[str]
    style: str = "part"

    @property
    def height(self) -> int:
        """Title, lines and margins."""
        return _PAD * 2 + _LINE * len(self.lines) + 6

    def svg(self) -> str:
        """The box and its text."""
        parts = [
            f'<rect class="{self.style}" x="{self.x}" y="{self.y}" '
            f'width="{self.width}" height="{self.height}" rx="6"/>',
            _text(self.x + 12, self.y + 22, self.title, "title"),
        ]
        parts += [_text(self.x + 12, self.y + 22 + _LINE * n, line) for n, line in enumerate(self.lines, 1)]
        return "\n".join(parts)


def _text(x: int, y: int, text: str, style: str = "") -> str:
    mark = f' class="{style}"' if style else ""
    return f'<text x="{x}" y="{y}"{mark}>{escape(text)}</text>'


def draw(run: Recording) -> str:
    """The SVG of a recorded stack. Raises LookupError when there is no site in it."""
    sites = run.outputs["sites"]
    private = [s for s in sites if s["kind"] != "cloud"]
    clouds = [s for s in sites if s["kind"] == "cloud"]
    if not private or not clouds:
        raise LookupError("a foundation has a private and a cloud site")
    parts: list[str] = []
    right, left, bottom = 560, 20, 0
    middles: dict[str, int] = {}
    y = 70
    for site in clouds:
        boxes = _cloud(run, site, right + 20, y + 44)
        height = boxes[-1].y + boxes[-1].height - y + 16
        parts += _site(site, right, y, 500, height)
        parts += [b.svg() for b in boxes]
        middles[site["name"]] = y + 70
        y += height + 24
    bottom = y
    y = 70
    for site in private:
        boxes = _private(run, site, left + 20, y + 44)
        height = boxes[-1].y + boxes[-1].height - y + 16
        parts += _site(site, left, y, 330, height)
        parts += [b.svg() for b in boxes]
        middles[site["name"]] = y + 70
        y += height + 24
    bottom = max(bottom, y)
    for connection in run.of("aws:ec2/vpnConnection:VpnConnection"):
        parts += _tunnels(connection, middles, left + 330, right)
    parts += _stores(run, bottom)
    height = bottom + 150
    description = f"{run.stack}: {len(run.custom())} resources"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Architecture declared by {escape(run.stack)}">\n<style>{_STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>\n'
        + "\n".join([_text(20, 34, description, "title"), *parts])
        + "\n</svg>\n"
    )


def _site(site: dict[str, str], x: int, y: int, width: int, height: int) -> list[str]:
    return [
        f'<rect class="site" x="{x}" y="{y}" width="{width}" height="{height}" rx="10"/>',
        _text(x + 16, y + 28, f"{site['name']} ({site['kind']}, {site['region']}, {site['cidr']})", "title"),
    ]


def _private(run: Recording, site: dict[str, str], x: int, y: int) -> list[Box]:
    router = next(
        r for r in run.of("aws:ec2/customerGateway:CustomerGateway") if r.inputs["tags"]["site"] == site["name"]
    )
    asn = router.inputs.get("bgpAsn") or router.inputs["bgpAsnExtended"]
    boxes = [Box(x, y, 290, "VPN router", [f"strongSwan + FRR, ASN {asn}", f"at {router.inputs['ipAddress']}"])]
    hosts = [r for r in run.of("command:remote:Command") if r.name != "kubeconfig"]
    if site["kind"] == "home" and hosts:
        api = run.outputs["api_url"]
        names = [r.name for r in hosts]
        lines = [f"API {api}", *names]
        boxes.append(Box(x, boxes[-1].y + boxes[-1].height + 12, 290, "k3s, control plane and workers", lines))
    return boxes


def _cloud(run: Recording, site: dict[str, str], x: int, y: int) -> list[Box]:
    name = site["name"]
    subnets = [s for s in run.of("aws:ec2/subnet:Subnet") if s.inputs["tags"]["site"] == name and "private" in s.name]
    endpoints = [
        e.name.removeprefix(f"{name}-")
        for e in run.of("aws:ec2/vpcEndpoint:VpcEndpoint")
        if e.inputs["tags"]["site"] == name
    ]
    zones = ", ".join(s.inputs["availabilityZone"] for s in sorted(subnets, key=lambda s: s.name))
    boxes = [
        Box(x, y, 460, "Private subnets", [zones]),
    ]
    boxes.append(_below(boxes[-1], "Endpoints", _wrapped(endpoints)))
    for group in run.of("aws:autoscaling/group:Group"):
        tags = {t["key"]: t["value"] for t in group.inputs["tags"]}
        if tags["site"] == name:
            boxes.append(_below(boxes[-1], f"GPU nodes {group.inputs['name']}", _group_lines(run, group), "gpu"))
    queues = [q for q in run.of("aws:sqs/queue:Queue") if q.inputs["tags"]["site"] == name and "dead" not in q.name]
    rules = [
        r.name.removeprefix(f"{name}-")
        for r in run.of("aws:cloudwatch/eventRule:EventRule")
        if r.inputs["tags"]["site"] == name
    ]
    if queues:
        boxes.append(_below(boxes[-1], f"Queue {queues[0].inputs['name']}", ["notices: " + ", ".join(sorted(rules))]))
    return boxes


def _group_lines(run: Recording, group: Recorded) -> list[str]:
    size = f"{group.inputs['minSize']} to {group.inputs['maxSize']} nodes"
    policy = group.inputs.get("mixedInstancesPolicy")
    if policy is None:
        template = next(t for t in run.of("aws:ec2/launchTemplate:LaunchTemplate") if t.name == group.name)
        pool = group.inputs["warmPool"]["minSize"]
        return [f"{size}, {template.inputs['instanceType']} on demand, {pool} in the warm pool"]
    types = ", ".join(o["instanceType"] for o in policy["launchTemplate"]["overrides"])
    shares = policy["instancesDistribution"]
    spot = 100 - shares["onDemandPercentageAboveBaseCapacity"]
    return [f"{size}, {types}", f"{shares['onDemandBaseCapacity']} on demand, above it {spot} % spot"]


def _below(box: Box, title: str, lines: Sequence[str], style: str = "part") -> Box:
    return Box(box.x, box.y + box.height + 12, box.width, title, lines, style)


def _wrapped(names: Sequence[str], width: int = 62) -> list[str]:
    lines = [""]
    for name in sorted(names):
        joined = f"{lines[-1]}, {name}" if lines[-1] else name
        if len(joined) > width:
            lines.append(name)
        else:
            lines[-1] = joined
    return lines


def _tunnels(connection: Recorded, middles: dict[str, int], x1: int, x2: int) -> list[str]:
    private, cloud = next((p, c) for p in middles for c in middles if connection.name == f"{p}-{c}")
    parts = []
    for number, offset in ((1, -10), (2, 22)):
        y1, y2 = middles[private] + offset, middles[cloud] + offset
        parts.append(f'<path class="tunnel" d="M{x1} {y1} L{x2} {y2}"/>')
        label = f"tunnel {number}: {connection.inputs[f'tunnel{number}InsideCidr']}"
        parts.append(_text(x1 + 24, (y1 + y2) // 2 - 5, label, "small"))
    (group,) = connection.inputs["tunnel1Phase1DhGroupNumbers"]
    (cipher,) = connection.inputs["tunnel1Phase1EncryptionAlgorithms"]
    middle = (middles[private] + middles[cloud]) // 2
    parts.append(_text(x1 + 24, middle + 60, f"DH group {group}", "small"))
    parts.append(_text(x1 + 24, middle + 42, f"IKEv2, {cipher}", "small"))
    return parts


def _stores(run: Recording, y: int) -> list[str]:
    buckets = run.of("aws:s3/bucket:Bucket")
    width = (WIDTH - 40 - 12 * (len(buckets) - 1)) // len(buckets)
    parts = [_text(20, y + 18, "Buckets: versioned, encrypted, TLS only", "title")]
    for index, bucket in enumerate(sorted(buckets, key=lambda b: b.name)):
        x = 20 + index * (width + 12)
        note = ["object lock"] if bucket.inputs.get("objectLockEnabled") else ["lifecycle"]
        region = bucket.provider.rpartition("::")[0].rpartition("aws-")[2]
        parts.append(Box(x, y + 30, width, bucket.name, [*note, region], "store").svg())
    return parts
