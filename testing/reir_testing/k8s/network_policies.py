"""Tells whether NetworkPolicies allow a connection, by the rules of Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NAME_LABEL = "kubernetes.io/metadata.name"
"""Label with its name, which Kubernetes gives to each namespace."""

Policies = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pod:
    """A pod as NetworkPolicies see it.

    Attributes:
        name: how messages call it.
        namespace: its namespace.
        labels: labels of the pod.
        namespace_labels: labels of the namespace, except its name.
    """

    name: str
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


def is_allowed(policies: Policies, source: Pod, target: Pod, port: int) -> bool:
    """Return whether `source` may connect to a TCP port of `target`."""
    leaves = _passes(policies, "egress", source, target, port)
    return leaves and _passes(policies, "ingress", target, source, port)


def _passes(policies: Policies, direction: str, own: Pod, other: Pod, port: int) -> bool:
    """Return whether the policies of `own` allow a connection in one direction.

    A pod that no policy selects may connect to everything.
    """
    selecting = [
        each["spec"]
        for each in policies
        if each["metadata"]["namespace"] == own.namespace
        and direction.capitalize() in each["spec"]["policyTypes"]
        and matches(each["spec"]["podSelector"], own.labels)
    ]
    side = "to" if direction == "egress" else "from"
    return not selecting or any(
        _has_peer(rule.get(side), own, other) and _has_port(rule.get("ports"), port)
        for spec in selecting
        for rule in spec.get(direction, ())
    )


def _has_peer(peers: Sequence[Mapping[str, Any]] | None, own: Pod, other: Pod) -> bool:
    """Return whether a rule names `other`; a rule without peers names everything."""
    if not peers:
        return True
    labels = {**other.namespace_labels, NAME_LABEL: other.namespace}
    for peer in peers:
        namespaces = peer.get("namespaceSelector")
        is_near = (
            own.namespace == other.namespace if namespaces is None else matches(namespaces, labels)
        )
        if is_near and matches(peer.get("podSelector", {}), other.labels):
            return True
    return False


def _has_port(ports: Sequence[Mapping[str, Any]] | None, port: int) -> bool:
    """Return whether a rule names a TCP port; a rule without ports names all."""
    if not ports:
        return True
    return any(
        each.get("protocol", "TCP") == "TCP"
        and each["port"] <= port <= each.get("endPort", each["port"])
        for each in ports
    )


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector selects labels; an empty one selects all.

    Raises:
        ValueError: an operator of the selector is not known here.
    """
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        if expression["operator"] != "In":
            raise ValueError(f"operator {expression['operator']!r}; known here: In")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True
