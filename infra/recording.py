"""A Pulumi engine that only writes down: the fake beside the real one, for tests and for documents made from a stack.

`record` runs the very program that Pulumi would run (`infra/__main__.py`, by runpy) against it. It keeps what the SDK
sends over the wire, so secrets stay marked as secrets and property names are the engine's. In a preview nothing that
only a cloud can know is known; otherwise each resource gets made-up outputs of the right shape (`_computed`). It does
not validate inputs as a provider would: that is what tests/engine is for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import runpy
import time
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

import pulumi
from google.protobuf import json_format, struct_pb2
from pulumi.runtime import mocks, set_all_config
from pulumi.runtime.proto import resource_pb2
from pulumi.runtime.settings import SETTINGS
from pulumi.runtime.stack import run_pulumi_func

from infra.rules import Marker, Resource

PROGRAM: Final = Path(__file__).parent
_SIGNATURE: Final = "4dabf18193072939515e22adb298388d"
_SECRET_SIGNATURE: Final = "1b47061264138c4ac30d75fd1eb44270"  # noqa: S105 -- the protocol's mark for secrets
_UNKNOWN: Final = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"


@dataclasses.dataclass(frozen=True)
class Secret:
    """A value that reached the engine marked as secret."""

    value: object = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A resource as the program registered it."""

    type: str
    name: str
    urn: str
    parent: str
    provider: str
    custom: bool
    inputs: Mapping[str, Any]
    """camelCase; secrets as `Secret`, unknowns as `Marker.UNKNOWN`."""
    dependencies: tuple[str, ...]
    ignored: tuple[str, ...]
    secret_outputs: tuple[str, ...]

    def plain(self, key: str) -> Any:  # noqa: ANN401 -- as untyped as the wire
        """An input with its secret marks taken off, for a test that must look inside."""
        return _reveal(self.inputs.get(key))

    def resource(self) -> Resource:
        """The record as rules see it: secrets hidden."""
        return Resource(self.type, self.name, {k: _hide(v) for k, v in self.inputs.items()})


@dataclasses.dataclass(frozen=True)
class Recording:
    """Everything a program declared."""

    stack: str
    resources: tuple[Recorded, ...]
    outputs: Mapping[str, Any]
    """Known outputs as plain values, unknown ones as `Marker.UNKNOWN`."""
    secret_outputs: frozenset[str]
    seconds: float
    """Processor time of the run, with the imports that it was the first to need."""

    def of(self, type_: str) -> list[Recorded]:
        """Resources of an engine type."""
        return [r for r in self.resources if r.type == type_]

    def one(self, type_: str, name: str) -> Recorded:
        """The resource of a type and name; raises LookupError unless there is exactly one."""
        found = [r for r in self.of(type_) if r.name == name]
        if len(found) != 1:
            raise LookupError(f"{len(found)} resources {type_} {name}; there are {[r.name for r in self.of(type_)]}")
        return found[0]

    def custom(self) -> list[Recorded]:
        """What a provider would create: no components, no providers."""
        return [r for r in self.resources if r.custom and not r.type.startswith("pulumi:")]

    def rules_view(self) -> list[Resource]:
        """All custom resources as rules see them."""
        return [r.resource() for r in self.custom()]


def record(
    stack: str,
    values: Mapping[str, str],
    secrets: Sequence[str] | frozenset[str],
    *,
    preview: bool = False,
    references: Mapping[str, Recording] | None = None,
) -> Recording:
    """Run the program for `stack` with raw configuration values; `secrets` names those that are encrypted.

    `references` are what other stacks, by their full names, were recorded to export. Whatever the program raises is
    raised; LookupError for a stack that it reads and that is not among them.
    """
    monitor = _Monitor(preview=preview, references=references or {})
    started = time.process_time()
    outputs: dict[str, Any] = {}
    hidden: set[str] = set()

    async def run() -> None:
        mocks.set_mocks(_NoMocks(), project="rankbridge", stack=stack, preview=preview, monitor=monitor)
        set_all_config(dict(values), list(secrets))
        await run_pulumi_func(_program)
        root = pulumi.runtime.get_root_resource()
        if not isinstance(root, pulumi.runtime.stack.Stack):
            raise TypeError("the program ran without a stack")
        for name, value in root.outputs.items():
            output = pulumi.Output.from_input(value)
            known = await output.is_known()
            if await output.is_secret():
                hidden.add(name)
            outputs[name] = await output.future(with_unknowns=True) if known else Marker.UNKNOWN

    try:
        _run(run())
    finally:
        set_all_config({}, [])
    seconds = time.process_time() - started
    # The SDK registers what does not wait for each other in any order.
    resources = tuple(sorted(monitor.recorded, key=lambda r: r.urn))
    return Recording(stack, resources, outputs, frozenset(hidden), seconds)


def _program() -> None:
    runpy.run_path(str(PROGRAM), run_name="__main__")


def _run(coroutine: Any) -> None:  # noqa: ANN401 -- a coroutine
    """Run on an event loop of its own, so that no other test's loop is touched."""
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(coroutine)
    finally:
        # A program that was refused half-way leaves its tasks behind, in the loop and in the SDK.
        abandoned = asyncio.all_tasks(loop)
        for task in abandoned:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*abandoned, return_exceptions=True))
        SETTINGS.rpc_manager.clear()
        SETTINGS.outputs.clear()
        loop.close()
        asyncio.set_event_loop(None)


class _NoMocks(mocks.Mocks):
    """The monitor below answers everything itself."""

    def call(self, args: mocks.MockCallArgs) -> Any:  # noqa: ANN401 -- the base class's
        raise AssertionError(f"the program asks a provider while it is being declared: {args.token}")

    def new_resource(self, args: mocks.MockResourceArgs) -> Any:  # noqa: ANN401 -- the base class's
        raise AssertionError(f"not registered through the recording monitor: {args.typ}")


class _Monitor(mocks.MockMonitor):
    """Writes down each registration and answers with made-up outputs."""

    def __init__(self, *, preview: bool, references: Mapping[str, Recording]) -> None:
        super().__init__(_NoMocks())
        self.preview = preview
        self.references = references
        self.recorded: list[Recorded] = []

    def ReadResource(self, request: Any) -> Any:  # noqa: N802, ANN401 -- the protocol's name and types
        """A stack's outputs, as the engine answers for a StackReference; nothing else is read."""
        if request.type != "pulumi:pulumi:StackReference":
            raise AssertionError(f"the program reads what it does not declare: {request.type} {request.id}")
        if request.id not in self.references:
            raise LookupError(f"the program reads the stack {request.id}, which was not recorded")
        of = self.references[request.id]
        properties = struct_pb2.Struct()
        properties.update(
            {
                "name": request.id,
                "outputs": {name: _to_wire(value, name in of.secret_outputs) for name, value in of.outputs.items()},
                "secretOutputNames": sorted(of.secret_outputs),
            }
        )
        urn = self.make_urn(request.parent, request.type, request.name)
        self.resources[urn] = mocks.MockMonitor.ResourceRegistration(urn, request.id, {})
        return resource_pb2.ReadResourceResponse(urn=urn, properties=properties)

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802, ANN401 -- the protocol's name and types
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type == "pulumi:pulumi:Stack":
            return resource_pb2.RegisterResourceResponse(urn=urn)
        inputs = {k: _from_wire(v) for k, v in json_format.MessageToDict(request.object).items()}
        if any(r.urn == urn for r in self.recorded):
            raise AssertionError(f"two resources with the name {urn}")
        self.recorded.append(
            Recorded(
                type=request.type,
                name=request.name,
                urn=urn,
                parent=request.parent,
                provider=request.provider or next(iter(request.providers.values()), ""),
                custom=request.custom,
                inputs=inputs,
                dependencies=tuple(request.dependencies),
                ignored=tuple(request.ignoreChanges),
                secret_outputs=tuple(request.additionalSecretOutputs),
            )
        )
        state = struct_pb2.Struct()
        state.CopyFrom(request.object)
        known = request.custom and (not self.preview or request.type.startswith("pulumi:"))
        if known:
            for key, value in _computed(request.type, request.name, inputs, self.recorded).items():
                if key not in state.fields:
                    state.update({key: value})
        id_ = f"{request.name}-id" if known else ""
        self.resources[urn] = mocks.MockMonitor.ResourceRegistration(urn, id_, {})
        return resource_pb2.RegisterResourceResponse(urn=urn, id=id_, object=state)


def _from_wire(value: Any) -> Any:  # noqa: ANN401 -- as untyped as the wire
    if isinstance(value, dict):
        if value.get(_SIGNATURE) == _SECRET_SIGNATURE:
            return Secret(_from_wire(value.get("value")))
        return {k: _from_wire(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_from_wire(v) for v in value]
    if value == _UNKNOWN:
        return Marker.UNKNOWN
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _to_wire(value: Any, secret: bool) -> Any:  # noqa: ANN401, FBT001 -- as untyped as the wire
    if value is Marker.UNKNOWN:
        return _UNKNOWN
    if secret:
        return {_SIGNATURE: _SECRET_SIGNATURE, "value": _to_wire(value, secret=False)}
    if isinstance(value, Mapping):
        return {k: _to_wire(v, secret=False) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_wire(v, secret=False) for v in value]
    return value


def _reveal(value: Any) -> Any:  # noqa: ANN401 -- as untyped as the wire
    if isinstance(value, Secret):
        return _reveal(value.value)
    if isinstance(value, dict):
        return {k: _reveal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_reveal(v) for v in value]
    return value


def _hide(value: Any) -> Any:  # noqa: ANN401 -- as untyped as the wire
    if isinstance(value, Secret):
        return Marker.SECRET
    if isinstance(value, dict):
        return {k: _hide(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hide(v) for v in value]
    return value


def _computed(type_: str, name: str, inputs: Mapping[str, Any], recorded: Sequence[Recorded]) -> dict[str, Any]:
    """Outputs that a provider would fill in: an ARN for everything, and what the program reads of some types."""
    service = type_.partition(":")[2].partition("/")[0]
    given = inputs.get("name") or inputs.get("bucket") or name
    number = int(hashlib.sha256(name.encode()).hexdigest()[:2], 16)
    computed: dict[str, Any] = {"arn": f"arn:aws:{service}:eu-central-1:111122223333:{given}"}
    match type_:
        case "aws:s3/bucket:Bucket":
            computed["arn"] = f"arn:aws:s3:::{given}"
        case "aws:ec2/launchTemplate:LaunchTemplate":
            computed["latestVersion"] = 1
        case "aws:ec2/vpcEndpoint:VpcEndpoint":
            computed["prefixListId"] = f"pl-{number:08x}"
            region_service = str(inputs.get("serviceName", "")).removeprefix("com.amazonaws.").split(".")
            dns = f"*.vpce-{number:017x}.s3.{region_service[0]}.vpce.amazonaws.com"
            computed["dnsEntries"] = [{"dnsName": dns, "hostedZoneId": "Z0"}]
        case "aws:ec2/vpnConnection:VpnConnection":
            computed |= {"tunnel1Address": f"198.51.100.{number}", "tunnel2Address": f"198.51.100.{(number + 1) % 256}"}
            addresses = [computed["tunnel1Address"], computed["tunnel2Address"]]
            computed["customerGatewayConfiguration"] = _configuration(inputs, addresses, recorded)
        case "aws:sqs/queue:Queue":
            computed["url"] = f"https://sqs.eu-central-1.amazonaws.com/111122223333/{given}"
        case "aws:ecr/repository:Repository":
            computed["repositoryUrl"] = f"111122223333.dkr.ecr.eu-central-1.amazonaws.com/{given}"
        case "command:remote:Command":
            computed["stdout"] = "clusters:\n- cluster:\n    server: https://127.0.0.1:6443\n  name: default\n"
    return computed


def _configuration(inputs: Mapping[str, Any], addresses: Sequence[str], recorded: Sequence[Recorded]) -> str:
    """AWS's configuration XML for a connection as it was declared, in AWS's layout."""
    by_id = {
        f"{r.name}-id": r for r in recorded if r.type.startswith(("aws:ec2/customerG", "aws:ec2/vpnG", "aws:ec2trans"))
    }
    router = by_id[inputs["customerGatewayId"]].inputs
    gateway = by_id[inputs.get("vpnGatewayId") or inputs["transitGatewayId"]].inputs
    ends = []
    for number, address in enumerate(addresses, 1):
        inside = IPv4Network(inputs[f"tunnel{number}InsideCidr"])
        aws = (address, inside[1], gateway["amazonSideAsn"])
        home = (router["ipAddress"], inside[2], router.get("bgpAsn") or router["bgpAsnExtended"])
        sides = "".join(
            f"<{side}><tunnel_outside_address><ip_address>{out}</ip_address></tunnel_outside_address>"
            f"<tunnel_inside_address><ip_address>{within}</ip_address></tunnel_inside_address>"
            f"<bgp><asn>{asn}</asn></bgp></{side}>"
            for side, (out, within, asn) in (("customer_gateway", home), ("vpn_gateway", aws))
        )
        key = _reveal(inputs[f"tunnel{number}PresharedKey"])
        ends.append(f"<ipsec_tunnel>{sides}<ike><pre_shared_key>{key}</pre_shared_key></ike></ipsec_tunnel>")
    return f"<vpn_connection>{''.join(ends)}</vpn_connection>"
