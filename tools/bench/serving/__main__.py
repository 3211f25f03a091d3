"""Our servers beside others: the same model, machine and load, arms in alternation.

    python -m tools.bench.serving --arms bare,http
    python -m tools.bench.serving --arms bare,http,rival --rival-python OTHER/.venv/bin/python

All servers run at once and are asked in turn, so that a machine that speeds up or slows down meets
all of them; ratios are taken within a round. An idle server takes little, but not nothing: what the
others used of the CPU meanwhile is told.

| arm | what it is |
| --- | --- |
| ``bare`` | vLLM's own OpenAI server, without MemShare |
| ``http`` | ``serve run`` of ``--config``, OpenAI HTTP |
| ``grpc`` | the same server, by gRPC |
| ``direct-http``, ``direct-grpc`` | its replica's own ports, without Ray Serve's proxy |
| ``rival`` | ``ray.serve.llm`` (rival_serve_llm.py), from an environment of its own |
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from memshare.lab.bench.report import machine
from memshare.lab.markdown import table
from memshare.small_model.names import resolve_model
from tools.bench.load import (
    Send,
    StreamLoad,
    Summary,
    grpc_streams,
    http_streams,
    summarize,
)
from tools.bench.local_cluster import START_S, Server, cluster_file, free_port, running_server
from tools.runtime_env import runtime_env

ROOT = Path(__file__).resolve().parents[3]

PROMPT = "Write about the lighthouse keeper, number {index}, who counts the ships of the day:"
# The engine of configs/cluster.yaml, for servers that do not read it.
ENGINE = {
    "dtype": "bfloat16", "max_model_len": 4096, "block_size": 32, "max_num_seqs": 32,
    "enforce_eager": True, "seed": 0,
}  # fmt: skip
NAME = "smollm2"


@dataclass
class ServerArm:
    """One server.

    Attributes:
        name: as on the command line.
        address: of its OpenAI API, without ``/v1``, or of its gRPC.
        pid: the process that everything of it descends from.
        rounds: what was measured.
    """

    name: str
    address: str
    pid: int
    rounds: list[ServingRound] = field(default_factory=list)

    def cpu_seconds(self) -> collections.Counter[str]:
        """CPU time that its processes have used so far, by what they are."""
        used = collections.Counter[str]()
        root = psutil.Process(self.pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                used[_part(process)] += times.user + times.system
            except psutil.Error:
                continue
        return used


@dataclass(frozen=True)
class ServingRound:
    """One arm, asked once.

    Attributes:
        alone: one stream at a time: what a request takes by itself.
        busy: many streams at once.
        cpu: CPU seconds of its processes while it was busy, by what they are.
        idle_cpu: cores that the other servers used meanwhile.
    """

    alone: Summary
    busy: Summary
    cpu: dict[str, float]
    idle_cpu: float


PARTS = {
    "VLLM::EngineCore": "engine",
    "VLLM::Worker": "worker",
    "ray::ServeReplica:memshare:Engine": "server",
    "ray::ServeReplica:default:LLMServer": "server",
    "ray::ServeReplica:default:OpenAiIngress": "ingress",
    "vllm.entrypoints": "server",
    "ray::ProxyActor": "proxy",
    "ray::HAProxyManager": "proxy",
    "haproxy": "proxy",
    "ray::ServeController": "controller",
    "ray::Evaluator": "evaluators",
    "ray::ServeReplica:memshare:Board": "page",
}
"""What a process's command line holds, and which part of a server that is; ``ray``: all else."""


def _part(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()[:4])
    if "multiprocessing.spawn" in command:  # an engine's worker, which has no title
        return "worker"
    return next((part for held, part in PARTS.items() if held in command), "ray")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default="bare,http,grpc")
    parser.add_argument("--config", default="cluster.yaml", help="of configs/, for http")
    parser.add_argument("--mode", choices=("off", "observe", "share"), help="MemShare's, for http")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens a request")
    parser.add_argument("--rival-python", metavar="PATH", help="interpreter that has ray[llm]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="environment of http"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="py-spy records of http's parts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    args = parser.parse_args()
    names = args.arms.split(",")
    known = ("bare", "http", "grpc", "direct-http", "direct-grpc", "rival")
    if unknown := set(names) - set(known):
        parser.error(f"--arms {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if "rival" in names and not args.rival_python:
        parser.error("arm rival needs --rival-python")
    return args


def main() -> None:
    """Start the servers, ask them in turn, print a table."""
    args = _options()
    names = args.arms.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the servers with it
    with ExitStack() as servers:
        found: dict[str, ServerArm] = {}
        if "bare" in names:
            found["bare"] = servers.enter_context(_bare())
        if "rival" in names:
            found["rival"] = servers.enter_context(_rival(args.rival_python))
        if set(names) - {"bare", "rival"}:
            settings = dict(setting.split("=", 1) for setting in args.set)
            direct = any(name.startswith("direct") for name in names)
            ports = _direct_ports() if direct else {}
            server = servers.enter_context(_ours(args.config, args.mode, {**settings, **ports}))
            addresses = {"http": server.url, "grpc": server.grpc_address}
            if direct:
                addresses["direct-http"] = f"http://127.0.0.1:{ports[_HTTP_PORT]}"
                addresses["direct-grpc"] = f"127.0.0.1:{ports[_GRPC_PORT]}"
            for name, address in addresses.items():
                found[name] = ServerArm(name, address, server.process.pid)
        arms = [found[name] for name in names]
        for arm in arms:  # every code path once, and prefix caches filled alike
            _ask(arm, 4, 8, 8)
        for number in range(args.rounds):
            for arm in arms if number % 2 == 0 else arms[::-1]:
                arm.rounds.append(_round(arm, arms, args))
                print(f"round {number + 1}, {arm.name}: {arm.rounds[-1].busy}", file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps([asdict(arm) for arm in arms], indent=1))
        if args.profile:
            _profile(found["http"], args)
    print(
        f"{args.streams} streams at once, {args.rounds} rounds of {args.requests} requests of "
        f"{args.tokens} tokens; {len(os.sched_getaffinity(0))} core(s); {machine()}.\n"
    )
    print(render(arms))
    print("\nCPU, ms for each streamed token:\n")
    print(render_cpu(arms, args.requests * args.tokens))


def _round(arm: ServerArm, arms: list[ServerArm], args: argparse.Namespace) -> ServingRound:
    alone = _ask(arm, 1, 24, 8)
    others = list({other.pid: other for other in arms if other.pid != arm.pid}.values())
    idle, used, began = _cpu(others), arm.cpu_seconds(), time.monotonic()
    busy = _ask(arm, args.streams, args.requests, args.tokens)
    seconds = time.monotonic() - began
    spent = dict(arm.cpu_seconds() - used)
    return ServingRound(alone, busy, spent, (_cpu(others) - idle) / seconds)


def _cpu(arms: list[ServerArm]) -> float:
    return sum(arm.cpu_seconds().total() for arm in arms)


def _ask(arm: ServerArm, streams: int, requests: int, tokens: int) -> Summary:
    def prompt(index: int) -> str:
        return PROMPT.format(index=index)

    def body(index: int) -> dict[str, Any]:
        options = {"max_tokens": tokens, "ignore_eos": True}
        return {"model": NAME, "prompt": prompt(index), **options}

    def senders() -> AbstractAsyncContextManager[Send]:
        if arm.name.endswith("grpc"):
            return grpc_streams(arm.address, prompt, tokens)
        return http_streams(f"{arm.address}/v1/completions", body)

    load = StreamLoad(senders, streams)
    asyncio.run(load.run(requests))
    found = summarize(load.outcomes)
    if found.endings != {"whole": requests}:
        details = {outcome.detail for outcome in load.outcomes if outcome.detail}
        raise SystemExit(f"{arm.name}: {found.endings}: {'; '.join(sorted(details))}")
    return found


def render(arms: list[ServerArm]) -> str:
    """A table of medians; ratios and differences are within a round, against the first arm."""
    first = arms[0]

    def row(arm: ServerArm) -> list[str]:
        pairs = list(zip(arm.rounds, first.rounds, strict=True))
        ratios = [mine.busy.requests_per_s / its.busy.requests_per_s for mine, its in pairs]
        later = [1e3 * (m.alone.first_token_p50 - i.alone.first_token_p50) for m, i in pairs]

        def median(value: Callable[[ServingRound], float]) -> float:
            return statistics.median(value(round_) for round_ in arm.rounds)

        return [
            arm.name,
            f"{median(lambda r: r.busy.requests_per_s):.2f}",
            f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{1e3 * median(lambda r: r.alone.first_token_p50):.1f}",
            f"{statistics.median(later):+.1f}",
            f"{1e3 * median(lambda r: r.busy.first_token_p50):.0f}",
            f"{1e3 * median(lambda r: r.busy.between_tokens_p50):.1f}",
            f"{median(lambda r: sum(r.cpu.values())):.1f}",
            f"{median(lambda r: r.idle_cpu):.2f}",
        ]

    heads = [
        "arm", "req/s", f"ratio to {first.name}", "TTFT p50 alone, ms", "difference",
        "TTFT p50 busy, ms", "between tokens p50, ms", "CPU s", "others' cores meanwhile",
    ]  # fmt: skip
    return table(heads, map(row, arms))


def render_cpu(arms: list[ServerArm], tokens: int) -> str:
    """Where the CPU time goes, by part of the server; medians of rounds of ``tokens`` tokens."""
    parts = sorted({part for arm in arms for round_ in arm.rounds for part in round_.cpu})

    def row(arm: ServerArm) -> list[str]:
        found = {p: statistics.median(r.cpu.get(p, 0.0) for r in arm.rounds) for p in parts}
        return [arm.name, *(f"{1e3 * found[part] / tokens:.2f}" for part in parts)]

    return table(["arm", *parts], map(row, arms))


_HTTP_PORT, _GRPC_PORT = (f"RAY_SERVE_DIRECT_INGRESS_MIN_{p}_PORT" for p in ("HTTP", "GRPC"))


def _direct_ports() -> dict[str, str]:
    """Ray Serve's settings for replicas that listen themselves."""
    http, grpc = free_port(), free_port()
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        _HTTP_PORT: str(http),
        _HTTP_PORT.replace("MIN", "MAX"): str(http + 1),
        _GRPC_PORT: str(grpc),
        _GRPC_PORT.replace("MIN", "MAX"): str(grpc + 1),
    }


@contextmanager
def _bare() -> Iterator[ServerArm]:
    port = free_port()
    options = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in ENGINE.items()
    ]
    command = [
        *[sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)],
        *["--host", "127.0.0.1", "--model", resolve_model("smollm2-135m")],
        *["--served-model-name", NAME, "--disable-uvicorn-access-log", *options],
    ]
    with _child("bare", command, _engine_env(), port) as arm:
        yield arm


@contextmanager
def _rival(python: str) -> Iterator[ServerArm]:
    port = free_port()
    command = [python, str(Path(__file__).with_name("rival_serve_llm.py")), "--port", str(port)]
    command += ["--model", resolve_model("smollm2-135m"), "--name", NAME]
    command += ["--engine", json.dumps(ENGINE)]
    env = {**_engine_env(), "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    with _child("rival", command, env, port) as arm:
        yield arm


@contextmanager
def _ours(config: str, mode: str | None, settings: Mapping[str, str]) -> Iterator[Server]:
    document = cluster_file(config)
    args = document["applications"][0]["args"]
    args["engine"].update(ENGINE)
    if mode is not None:
        args["memshare"]["mode"] = mode
    os.environ.update(runtime_env({**os.environ, **settings}))
    with (
        tempfile.TemporaryDirectory(prefix="memshare-bench-") as folder,
        running_server(Path(folder), document) as server,
    ):
        yield server


def _engine_env() -> dict[str, str]:
    """What configs/cluster.yaml gives a replica."""
    env = cluster_file()["applications"][0]["args"]["replica"]["env"]
    return runtime_env({**os.environ, **env})


@contextmanager
def _child(name: str, command: list[str], env: Mapping[str, str], port: int) -> Iterator[ServerArm]:
    with tempfile.NamedTemporaryFile(prefix=f"memshare-{name}-", suffix=".log") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _await(process, url, Path(log.name))
            yield ServerArm(name, url, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    raise SystemExit(f"no server at {url}:\n{log.read_text(errors='replace')[-3000:]}")


def _profile(arm: ServerArm, args: argparse.Namespace) -> None:
    """Record what Python of proxy, replica and engine does while busy: py-spy's raw stacks."""
    args.profile.mkdir(parents=True, exist_ok=True)
    wanted = ("ray::ProxyActor", "ray::ServeReplica:memshare:Engine", "VLLM::EngineCore")
    recorders = []
    for process in psutil.Process(arm.pid).children(recursive=True):
        title = (process.cmdline() or [""])[0]
        if title.startswith(wanted):
            file = args.profile / f"{title.split(':')[2]}-{process.pid}.txt"
            command = ["py-spy", "record", "--pid", str(process.pid), "--duration", "15"]
            # Who holds the GIL: C code that waits looks busy otherwise.
            command += ["--gil", "--format", "raw", "--rate", "200", "--output", str(file)]
            recorders.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    _ask(arm, args.streams, 2 * args.requests, args.tokens)
    for recorder in recorders:
        recorder.wait(60)


if __name__ == "__main__":
    main()
