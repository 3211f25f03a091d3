"""A cluster under load for hours, while its parts are killed at random. Ends with a report.

    python -m tools.bench.soak --hours 1 --output soak            faults, memory under pressure
    python -m tools.bench.soak --hours 0.17 --load --output load  256 short streams on two replicas

Needs nothing but this machine: a Ray cluster of its own, the test reasoner, SIGKILL. The streams
are the reasoner's problems, so that answers can be graded; KV blocks are so few that requests are
reclaimed from, and some preempted. Between faults the load pauses now and then: with nothing else
running, fixed questions at temperature 0 must be answered word for word as at the start, and no KV
block, process, port or shared-memory segment may be left over. Ctrl-C ends the run and reports; a
second one does not report. The exit status is 1 if a check has failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from cluster.processes.workers import shared_memory
from memshare.lab.bench.report import machine
from memshare.lab.problems import generate
from tools.bench.load import StreamLoad, StreamOutcome, http_streams
from tools.bench.local_cluster import (
    ROLES,
    Server,
    cluster_file,
    kill,
    local_ray,
    memshare_in,
    processes,
    start,
    stop,
    victims,
    wait_until_whole,
)
from tools.bench.soak.report import COUNTED, ClusterSample, Fault, SoakRecord, judge, write
from tools.runtime_env import runtime_env

# Shorter than a block, so that no cached prefix changes how they are computed.
PROBES = (
    "The capital of France is", "Water boils at", "One, two, three, four,", "The sun rises in the",
)  # fmt: skip
SAMPLE_S = 10.0
SETTLE_S = 1.0  # from the last answer to the look at what is left
SCRAPES = 8  # of /metrics for one sample of several replicas


class Soak:
    """One run against one server."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server = server
        self.args = args
        self.record = SoakRecord(" ".join(sys.argv[1:]), machine())
        self.began = time.monotonic()
        body = _short if args.load else _problem
        route = "completions" if args.load else "chat/completions"
        url = f"{server.url}/v1/{route}"
        self.load = StreamLoad(lambda: http_streams(url, body), args.streams)
        self.random = random.Random(args.seed)
        self.turns: list[str] = []
        self._over = asyncio.Event()
        self._segments: set[Path] = set()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    async def run(self) -> SoakRecord:
        """Run for as long as was asked, or until Ctrl-C."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt, loop)
        self.load.paused = True  # until the first look
        streams = asyncio.create_task(self.load.run())
        sampling = asyncio.create_task(self._sample_on())
        try:
            await self._rest()
            while not await self._over_within(1.0 if self.args.load else self.args.every):
                if not self.args.load:
                    await self._break_something()
                    await self._rest()
            self.load.stop()
            await streams
            await self._rest()
        except (AssertionError, openai.APIError) as error:  # what was seen so far is worth a report
            self.record.cut_short = f"{type(error).__name__}: {error}"[:300]
        finally:
            streams.cancel()
            sampling.cancel()
            loop.remove_signal_handler(signal.SIGINT)
        self.record.seconds = self.now
        self.record.outcomes = [self._since_start(o) for o in self.load.outcomes]
        return self.record

    def _interrupt(self, loop: asyncio.AbstractEventLoop) -> None:
        self.record.cut_short = "interrupted"
        self._over.set()
        loop.remove_signal_handler(signal.SIGINT)  # the next one is an ordinary one

    async def _over_within(self, seconds: float) -> bool:
        """Wait so long, or until the run is over; returns whether it is."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        return self._over.is_set() or self.now >= self.args.hours * 3600

    async def _break_something(self) -> None:
        if not self.turns:  # at random, but everybody gets a turn
            # On a GPU the worker of a single rank is no process of its own.
            roles = [role for role in self.args.faults if victims(role)]
            assert roles, f"nobody plays {', '.join(self.args.faults)} here"
            self.turns = self.random.sample(roles, len(roles))
        role = self.turns.pop()
        at = self.now
        killed = kill(role)
        taken = await asyncio.to_thread(wait_until_whole, self.server, killed)
        self.record.faults.append(Fault(role, at, at + taken))
        print(f"{self.now:6.0f} s: {role} killed, whole after {taken:.1f} s", flush=True)

    async def _rest(self) -> None:
        """Pause the load, and look at what must not have changed."""
        await self.load.quiet()
        await asyncio.sleep(SETTLE_S)
        # Without pressure nothing is shared, so that answers must be exact.
        answers = [await asyncio.to_thread(self._probe, prompt) for prompt in PROBES]
        self.record.probes.append((self.now, answers))
        self.record.samples.append(await asyncio.to_thread(self._sample, True))
        self.load.paused = False

    def _probe(self, prompt: str) -> str:
        answer = self.server.client.completions.create(
            model=NAME, prompt=prompt, max_tokens=48, temperature=0
        )
        return answer.choices[0].text

    async def _sample_on(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.record.samples.append(await asyncio.to_thread(self._sample, False))

    def _sample(self, quiet: bool) -> ClusterSample:
        memory: dict[str, int] = {}
        # Ray keeps a few idle workers, more or fewer of them.
        idle = {process.pid for process in processes("ray::IDLE")}
        ours = [process for process in processes("") if process.pid not in idle]
        ports = 0
        for process in ours:
            self._segments |= shared_memory(process)
            try:
                name = f"{_name(process.cmdline())} {process.pid}"
                memory[name] = process.memory_full_info().pss
                ports += sum(c.status == "LISTEN" for c in process.net_connections("tcp"))
            except psutil.Error:
                continue
        # Ray Serve chooses which replica answers: asked often, each does.
        usages = [self._metrics() for _ in range(1 if self.args.replicas == 1 else SCRAPES)]
        return ClusterSample(
            self.now, quiet, memory, sum(memory.values()), len(ours),
            sum(path.exists() for path in self._segments), ports, max(usages),
        )  # fmt: skip

    def _metrics(self) -> float:
        """Take counters in; returns the KV usage, or nan while nobody answers."""
        try:
            text = self.server.metrics()
        except httpx.HTTPError:  # something is broken just now
            return float("nan")
        usage = float("nan")
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("vllm:kv_cache_usage_perc"):
                usage = float(value)
            for wanted in COUNTED:
                # An engine's counters begin anew with it: the greatest value stands for its life.
                if name.startswith(wanted) and 'result="passed"' not in name:
                    self.record.counters[wanted] = max(
                        self.record.counters[wanted], int(float(value))
                    )
        return usage

    def _since_start(self, outcome: StreamOutcome) -> StreamOutcome:
        outcome.sent -= self.began
        outcome.ended -= self.began
        if outcome.first_token is not None:
            outcome.first_token -= self.began
        return outcome


NAME = "smollm2"


def _name(command: Sequence[str]) -> str:
    """What a process is: a role, or the name of its script or program."""
    title = command[0] if command else "?"
    for role, beginning in ROLES.items():
        if title.startswith(beginning):
            return role
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(":")[-1].split(".")[0]
    if Path(title).name.startswith("python"):
        title = next((word for word in command[1:] if not word.startswith("-")), title)
    return Path(title.split()[0]).name


def _problem(index: int) -> dict[str, Any]:
    problem = generate("chain" if index % 2 else "recall", 10_000 + index)
    message = {"role": "user", "content": problem.prompt}
    return {"model": NAME, "messages": [message], "max_tokens": 1100, "temperature": 0}


def _short(index: int) -> dict[str, Any]:
    prompt = f"Request {index}: name a colour, an animal and a city."
    return {"model": NAME, "prompt": prompt, "max_tokens": 16, "ignore_eos": True}


def _document(args: argparse.Namespace) -> dict[str, Any]:
    document = cluster_file(args.config)
    application = document["applications"][0]["args"]
    application.update(
        model="smollm2-135m" if args.load else args.model,
        served_model_name=NAME,
        replicas=args.replicas,
        page={"show_text": True},  # nobody's secrets
    )
    application["engine"].update(
        num_gpu_blocks_override=args.blocks,
        max_model_len=2048,  # problems need less; one request of this length has to fit the blocks
        tensor_parallel_size=args.tensor_parallel,
    )
    if "evaluator" in args.faults and not args.load:
        memshare_in(document)["evaluator"] = memshare_in(cluster_file("demo.yaml"))["evaluator"]
    memshare_in(document)["integrity"] = {"check_every": args.check_every}
    return document


def main() -> int:
    """Run and report; the exit status is 1 if a check has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--load", action="store_true", help="short streams, no faults")
    parser.add_argument("--config", default="cluster.yaml", help="of configs/")
    parser.add_argument("--model", default="smollm2-135m-reasoner")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="workers of a replica")
    parser.add_argument("--replicas", type=int, help="default: 1; with --load 2")
    parser.add_argument("--streams", type=int, help="at once; default: 8; with --load 256")
    parser.add_argument("--blocks", type=int, help="KV blocks; default: 110; with --load 1400")
    parser.add_argument("--every", type=float, default=60.0, help="seconds from rest to fault")
    parser.add_argument("--faults", help=f"default: all of {', '.join(ROLES)} that there are")
    parser.add_argument("--check-every", type=int, default=64, help="integrity.check_every")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument(
        "--output", type=Path, default=Path(".run/soak"), help="folder of the report"
    )
    args = parser.parse_args()
    defaults = (2, 256, 1400) if args.load else (1, 8, 110)
    for name, value in zip(("replicas", "streams", "blocks"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.faults = list(ROLES) if args.faults is None else args.faults.split(",")
    if unknown := set(args.faults) - set(ROLES):
        parser.error(f"--faults {', '.join(sorted(unknown))}: choose from {', '.join(ROLES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.update(runtime_env(os.environ))
    with local_ray(), tempfile.TemporaryDirectory(prefix="memshare-soak-") as folder:
        server = start(Path(folder), _document(args))
        try:
            started = server.wait_until_it_answers()
            print(f"started in {started:.0f} s; live page: {server.url}/memshare/", flush=True)
            record = asyncio.run(Soak(server, args).run())
            checks = list(judge(record, graded=not args.load))
            write(args.output, record, checks)
        finally:
            (args.output / "serve.log").write_bytes(server.log.read_bytes())
            stop(server)
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
