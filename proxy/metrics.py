"""Metrics of the proxy."""

from __future__ import annotations

from zenith_utils.metrics import IntegerFamily, Metrics

from .endpoint import Traffic


def proxy_metrics(traffic: Traffic) -> Metrics:
    """What the proxy tells on /metrics."""
    metrics = Metrics("zenith_proxy")

    def collect() -> list[IntegerFamily]:
        counters = (
            ("num_connections_accepted", "Connections of clients accepted", traffic.accepted),
            ("num_connections_closed", "Connections of clients that are over", traffic.closed),
            ("num_bytes_proxied", "Bytes handed on, in both directions", traffic.proxied),
        )
        families = []
        for name, text, value in counters:
            family = IntegerFamily(f"{metrics.prefix}_{name}", text, kind="counter")
            family.add(value)
            families.append(family)
        return families

    metrics.add_source(collect)
    return metrics
