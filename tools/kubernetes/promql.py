"""Reading PromQL with a real parser: is it valid, and which series does it ask for?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import promql_parser

from tools.kubernetes.metrics import exported, labels_of

# Grafana fills these in before Prometheus sees the query.
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h"}
_NAME = re.compile(r"\$\w+")


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """Every vector that a query selects.

    Raises:
        ValueError: it is no PromQL.
    """
    for variable, value in _VARIABLES.items():
        query = query.replace(variable, value)
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    try:
        promql_parser.walk(promql_parser.parse(_NAME.sub("x", query)), visit)
    except ValueError as error:
        raise ValueError(f"{query!r} is no PromQL: {error}") from None
    return iter(found)


def faults(query: str) -> Iterator[str]:
    """What is wrong: syntax, series that nobody exports, labels that ours don't have."""
    try:
        vectors = list(selectors(query))
    except ValueError as error:
        yield str(error)
        return
    if not vectors:
        yield f"{query!r} asks for no series"
    for vector in vectors:
        if vector.name not in exported("vllm") | exported("ray"):
            yield f"nobody exports {vector.name!r}"
            continue
        known = labels_of(vector.name)
        if known is None:
            continue
        for matcher in vector.matchers.matchers:
            if matcher.name not in known:
                yield f"{vector.name!r} has no label {matcher.name!r}"
