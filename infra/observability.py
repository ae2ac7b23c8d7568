"""What watches the apps: monitors of sidecars, alerts on the promises, dashboards as code.

Alerts burn against `workloads.contract.slo` by the multi-window rates of Google's SRE workbook ("Alerting on SLOs").
Every series named here is one that a process of ours or Triton exports; a test holds it against the source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import pulumi
import pulumi_kubernetes as k8s
from pulumi import ResourceOptions

from infra import pods, service
from infra.apps_config import Role, SiteSettings
from infra.edges import ROLE_LABEL, SERVING
from workloads.contract.slo import BELOW_BEST_RUNG_SHARE, DEADLINE_MS, Endpoint

BUDGET: Final = 0.01
"""Share of requests that may miss their deadline, or fail: a p99 is a promise about 99 in 100."""
WINDOWS: Final = (("1h", "5m", 14.4, "critical"), ("6h", "30m", 6.0, "warning"))
"""Long window, short window, how many times faster than allowed the budget burns, severity."""
GAUGES: Final = "rankbridge-alerts"


class Observability(pulumi.ComponentResource):
    """Monitors, rules and dashboards; the first two only where prometheus-operator's kinds are."""

    def __init__(
        self, name: str, sites: Sequence[SiteSettings], *, kinds: bool, opts: ResourceOptions | None = None
    ) -> None:
        super().__init__("rankbridge:apps:Observability", name, None, opts)
        child = ResourceOptions(parent=self)

        def meta(name: str, **labels: str) -> k8s.meta.v1.ObjectMetaArgs:
            return k8s.meta.v1.ObjectMetaArgs(name=name, namespace=SERVING, labels={**pods.MANAGED, **labels})

        for title, board in dashboards(sites).items():
            k8s.core.v1.ConfigMap(
                f"dashboard-{title}",
                metadata=meta(f"dashboard-{title}", grafana_dashboard="1"),
                data={f"{title}.json": json.dumps(board, sort_keys=True)},
                opts=child,
            )
        if kinds:
            k8s.apiextensions.CustomResource(
                "agents",
                api_version="monitoring.coreos.com/v1",
                kind="PodMonitor",
                metadata=meta("agents"),
                spec=agents_monitor(),
                opts=child,
            )
            k8s.apiextensions.CustomResource(
                GAUGES,
                api_version="monitoring.coreos.com/v1",
                kind="PrometheusRule",
                metadata=meta(GAUGES),
                spec={"groups": rule_groups(sites)},
                opts=child,
            )
        self.register_outputs({})


def agents_monitor() -> dict[str, Any]:
    """Every agent beside whatever it serves."""
    served = [r.value for r in (Role.GATEWAY, Role.RETRIEVAL, Role.TRITON)]
    return {
        "selector": {"matchExpressions": [{"key": ROLE_LABEL, "operator": "In", "values": served}]},
        "namespaceSelector": {"matchNames": [SERVING]},
        "podMetricsEndpoints": [
            {"port": "agent", "path": "/metrics", "interval": "15s", "relabelings": service.relabelings("pod")}
        ],
    }


def _late(endpoint: Endpoint, window: str) -> str:
    """Share of an endpoint's requests at gateways that took longer than promised."""
    edge = f"{DEADLINE_MS[endpoint] / 1000:g}"
    series = f'endpoint="{endpoint.value}",role="gateway"'
    within = f'sum by (site) (rate(rankbridge_request_seconds_bucket{{{series},le="{edge}"}}[{window}]))'
    return f"1 - ({within} / sum by (site) (rate(rankbridge_request_seconds_count{{{series}}}[{window}])))"


def _failed(window: str) -> str:
    """Share of requests at gateways that ended in a fault of ours."""
    gateways = 'role="gateway"'
    bad = f'sum by (site) (rate(rankbridge_responses_total{{{gateways},status=~"5.."}}[{window}]))'
    return f"({bad} / sum by (site) (rate(rankbridge_responses_total{{{gateways}}}[{window}])))"


def rule_groups(sites: Sequence[SiteSettings]) -> list[dict[str, Any]]:
    """Alerts, as Prometheus' rule files have them."""
    burning = []
    for long, short, factor, severity in WINDOWS:
        limit = f"{factor * BUDGET:g}"
        for endpoint in Endpoint:
            word = endpoint.value.rpartition("/")[2]
            burning.append(
                _alert(
                    f"{word.title()}Late",
                    f"({_late(endpoint, long)}) > {limit} and ({_late(endpoint, short)}) > {limit}",
                    "2m",
                    severity,
                    f"{endpoint.value} at {{{{ $labels.site }}}} misses {DEADLINE_MS[endpoint]:g} ms "
                    f"{factor:g} times as often as its budget allows",
                )
            )
        burning.append(
            _alert(
                "Failing",
                f"{_failed(long)} > {limit} and {_failed(short)} > {limit}",
                "2m",
                severity,
                f"{{{{ $labels.site }}}} fails {factor:g} times as often as the budget allows",
            )
        )
    below = 'sum by (site) (rate(rankbridge_answers_total{role="gateway",reason!=""}[30m]))'
    share = f'{below} / sum by (site) (rate(rankbridge_answers_total{{role="gateway"}}[30m]))'
    state = [
        _alert(
            "BelowBestRung",
            f"{share} > {BELOW_BEST_RUNG_SHARE:g}",
            "15m",
            "warning",
            "{{ $labels.site }} answers from below its best rung more often than promised",
        ),
        _alert(
            "ChannelUnreachable",
            "min by (site) (rankbridge_agent_channel_reached) == 0",
            "30m",
            "warning",
            "an agent of {{ $labels.site }} cannot read its channel; what is served stays",
        ),
        _alert(
            "MixedEditions",
            'count by (site) (count by (site, bundle, delta) (rankbridge_edition{role="gateway"} == 1)) > 1',
            "10m",
            "warning",
            "gateways of {{ $labels.site }} serve different editions for ten minutes",
        ),
        _alert(
            "ProfilesStale",
            "max by (site) (rankbridge_feedback_staleness_seconds) > 60",
            "5m",
            "warning",
            "what people do reaches their profiles a minute late",
        ),
        _alert(
            "RankerQueue",
            "sum by (site) (rate(nv_inference_queue_duration_us[5m]))"
            " / clamp_min(sum by (site) (rate(nv_inference_request_success[5m])), 1) > 20000",
            "5m",
            "warning",
            "requests wait 20 ms for Triton at {{ $labels.site }}",
        ),
    ]
    silent = [
        _alert(
            f"NoGateway{site.name.title().replace('-', '')}",
            f'absent(rankbridge_in_flight{{site="{site.name}",role="gateway"}})',
            "5m",
            "critical",
            f"no gateway of {site.name} is heard from",
        )
        for site in sites
    ]
    return [
        {"name": "rankbridge-promises", "rules": burning},
        {"name": "rankbridge-state", "rules": [*state, *silent]},
    ]


def _alert(name: str, expression: str, wait: str, severity: str, summary: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def dashboards(sites: Sequence[SiteSettings]) -> dict[str, dict[str, Any]]:
    """Grafana dashboards by their file name."""
    on = 'site=~"$site"'
    serving = [
        (
            "Requests a second",
            f'sum by (endpoint, site) (rate(rankbridge_request_seconds_count{{{on},role="gateway"}}[5m]))',
        ),
        ("p99, seconds", _quantile(0.99, "rankbridge_request_seconds", f'{on},role="gateway"', "endpoint, site")),
        ("p99 of stages, seconds", _quantile(0.99, "rankbridge_stage_seconds", f'{on},role="gateway"', "stage, site")),
        ("Answers by rung", f"sum by (rung, site) (rate(rankbridge_answers_total{{{on}}}[5m]))"),
        ("Faults of neighbours", f"sum by (reason, site) (rate(rankbridge_neighbour_faults_total{{{on}}}[5m]))"),
        ("In flight", f'sum by (site) (rankbridge_in_flight{{{on},role="gateway"}})'),
    ]
    models = [
        ("Editions served", f'sum by (bundle, delta, site) (rankbridge_edition{{{on},role="gateway"}})'),
        ("Refused releases", f"sum by (reason, site) (increase(rankbridge_agent_refusals_total{{{on}}}[1h]))"),
        ("Seconds of the last flip", f"max by (site) (rankbridge_agent_flip_seconds{{{on}}})"),
        ("Triton's queue, microseconds a request", _per_request("nv_inference_queue_duration_us", on)),
        ("Triton's computing, microseconds a request", _per_request("nv_inference_compute_infer_duration_us", on)),
        ("GPU use", f"avg by (site) (nv_gpu_utilization{{{on}}})"),
    ]
    events = [
        ("Events by what became of them", "sum by (outcome) (rate(rankbridge_events_total[5m]))"),
        ("Events that wait for the disk", "sum(rankbridge_events_queued)"),
        ("Profiles behind, seconds", "max(rankbridge_feedback_staleness_seconds)"),
        ("p99 from event to profile, seconds", _quantile(0.99, "rankbridge_freshness_seconds", "", "site")),
    ]
    names = [site.name for site in sites]
    return {
        "serving": _board("serving", "rankbridge: serving", serving, names),
        "models": _board("models", "rankbridge: models", models, names),
        "events": _board("events", "rankbridge: events", events, names),
    }


def _quantile(q: float, histogram: str, labels: str, by: str) -> str:
    return f"histogram_quantile({q:g}, sum by (le, {by}) (rate({histogram}_bucket{{{labels}}}[5m])))"


def _per_request(counter: str, labels: str) -> str:
    requests = f"sum by (site) (rate(nv_inference_request_success{{{labels}}}[5m]))"
    return f"sum by (site) (rate({counter}{{{labels}}}[5m])) / clamp_min({requests}, 1)"


def _board(uid: str, title: str, panels: Sequence[tuple[str, str]], sites: Sequence[str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": f"rankbridge-{uid}",
        "title": title,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {"name": "site", "type": "custom", "query": ",".join(sites), "multi": True, "includeAll": True},
            ]
        },
        "panels": [
            {
                "id": number,
                "type": "timeseries",
                "title": name,
                "datasource": source,
                "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
                "targets": [{"refId": "A", "datasource": source, "expr": expression}],
            }
            for number, (name, expression) in enumerate(panels)
        ],
    }
