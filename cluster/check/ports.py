"""Who listens where an application is going to: nobody, a MemShare server, or something else."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Literal, NamedTuple, cast
from urllib.error import HTTPError

import grpc

from cluster.check.report import CheckFinding
from memshare.proto import memshare_pb2 as pb
from memshare.proto.memshare_pb2_grpc import MemShareStub

SECTION = "machine"
_ANSWER_S = 5.0
_MOST_BYTES = 1 << 20
# What proxies of Ray Serve say until they have somewhere to send a request.
_NOT_YET = ("Route table is not populated yet", "No replicas are available yet")

Who = Literal["memshare", "starting", "ray", "other"]


@dataclass(frozen=True, slots=True)
class Serving:
    """Where an application will be served, and as what.

    Attributes:
        application: its name.
        route: its ``route_prefix``.
        model: name of the model in the OpenAI API.
        http: host and port.
        grpc: host and port; None without gRPC.
    """

    application: str
    route: str
    model: str
    http: tuple[str, int]
    grpc: tuple[str, int] | None


class PortAnswer(NamedTuple):
    """What is known of who answers on a port."""

    who: Who
    detail: str = ""
    models: tuple[str, ...] | None = None
    """That it serves; None if it does not say."""


def look_at_ports(serving: Serving) -> tuple[list[CheckFinding], bool]:
    """Judge the application's ports; the second value says whether a MemShare server runs there."""
    ports = {"HTTP": serving.http} | ({"gRPC": serving.grpc} if serving.grpc is not None else {})
    answers = {
        name: (_ask_http if name == "HTTP" else _ask_grpc)(serving, _near(host), port)
        for name, (host, port) in ports.items()
        if is_taken(host, port)
    }
    runs = any(answer.who in ("memshare", "starting") for answer in answers.values())
    findings = [
        finding
        for name, (_, port) in ports.items()
        for finding in _judge(f"port {port} ({name})", answers.get(name), serving, runs)
    ]
    return findings, runs


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _judge(
    port: str, answer: PortAnswer | None, serving: Serving, runs: bool
) -> Iterator[CheckFinding]:
    if answer is None:
        other = "though a MemShare server answers on the other port: it is served without this one"
        yield CheckFinding(SECTION, "ok", f"{port} is free{f', {other}' if runs else ''}")
    elif answer.who == "starting":
        yield CheckFinding(
            SECTION, "warn", f"{port}: {answer.detail}",
            "wait until it has started, or look into its log",
        )  # fmt: skip
    elif answer.who == "memshare":
        if answer.models is None or serving.model in answer.models:
            named = f", model {serving.model}" if answer.models else ""
            yield CheckFinding(SECTION, "ok", f"{port}: a MemShare server answers there{named}")
            return
        yield CheckFinding(
            SECTION, "warn",
            f"{port}: a MemShare server answers there, with the model "
            f"{', '.join(answer.models)} instead of {serving.model}",
            "`serve deploy` replaces it; to have both, set other ports in this file",
        )  # fmt: skip
    elif answer.who == "ray":
        yield CheckFinding(
            SECTION, "fail", f"{port}: Ray Serve answers there, with {answer.detail}",
            "add this application to that cluster's file, or set another port",
        )  # fmt: skip
    else:
        yield CheckFinding(
            SECTION, "fail", f"{port} is taken by a program that is no MemShare server",
            "stop the program that listens there, or set another port",
        )  # fmt: skip


def _near(host: str) -> str:
    """An address to ask, of the host that a server listens on."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


# What our part of Ray Serve's proxies answers (cluster/http/proxy.py): this one is MemShare's.
_CLOSED = "/-/routes is closed"


def _ask_http(serving: Serving, host: str, port: int) -> PortAnswer:
    """Whatever listens may be any program: every answer is doubted."""
    base = f"http://{host}:{port}"
    try:
        reply = _get(f"{base}/-/routes")
        if reply.status == 503 and any(text in reply.text for text in _NOT_YET):
            return PortAnswer("starting", "Ray Serve is there, and serves nothing yet")
        is_closed = reply.status == 404 and _CLOSED in reply.text
        routes = {serving.route: serving.application} if is_closed else json.loads(reply.text)
    except (ValueError, OSError, HTTPException):
        return PortAnswer("other")
    if not isinstance(routes, Mapping):
        return PortAnswer("other")
    app = routes.get(serving.route)
    if app is None:
        names = ", ".join(f"'{name}' at {route}" for route, name in routes.items())
        return PortAnswer("ray", f"the applications {names}" if names else "no application")
    own = base + serving.route.rstrip("/")
    try:
        page, listed = _get(f"{own}/memshare/"), _get(f"{own}/v1/models")
        models = _models(listed)
    except (OSError, HTTPException) as error:
        if app != serving.application:
            return PortAnswer("ray", f"the application '{app}' at {serving.route}")
        return PortAnswer(
            "starting", f"the application '{app}' is there, but does not answer ({error})"
        )
    ours = "<title>MemShare" in page.text
    if listed.status >= 500 and (ours or app == serving.application):
        return PortAnswer(
            "starting", f"a MemShare server is there, but not ready (HTTP {listed.status})"
        )
    # The page may be switched off. Without it, what vLLM and our gate answer has to do.
    if ours or (app == serving.application and (models is not None or listed.status == 401)):
        return PortAnswer("memshare", models=models)
    return PortAnswer("ray", f"the application '{app}' at {serving.route}")


# The method is known, but not for everybody.
_GUARDED = (
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)  # fmt: skip


class _Reply(NamedTuple):
    status: int
    text: str


def _get(url: str) -> _Reply:
    """One request, past the proxies of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_S) as answer:
            return _Reply(answer.status, answer.read(_MOST_BYTES).decode(errors="replace"))
    except HTTPError as refusal:
        with refusal:
            return _Reply(refusal.code, refusal.read(_MOST_BYTES).decode(errors="replace"))


def _models(reply: _Reply) -> tuple[str, ...] | None:
    if reply.status != 200:
        return None
    try:
        return tuple(str(model["id"]) for model in json.loads(reply.text)["data"])
    except (ValueError, LookupError, TypeError):
        return None


def _ask_grpc(serving: Serving, host: str, port: int) -> PortAnswer:
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"{host}:{port}", options=options) as channel:
        try:
            info = MemShareStub(channel).GetModelInfo(
                pb.GetModelInfoRequest(),
                timeout=_ANSWER_S,
                metadata=[("application", serving.application)],
            )
        except grpc.RpcError as error:
            return _of_status(cast(grpc.Call, error))
        return PortAnswer("memshare", models=(info.model,))


def _of_status(error: grpc.Call) -> PortAnswer:
    code, detail = error.code(), (error.details() or "").strip().partition("\n")[0]
    if code in _GUARDED:
        return PortAnswer("memshare")
    if code == grpc.StatusCode.NOT_FOUND and "pplication" in detail:  # says Ray Serve's proxy
        return PortAnswer("ray", "other applications")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return PortAnswer("starting", "a gRPC server is there, but does not answer")
    return PortAnswer("other")
