"""``memshare moe affinity``: whether experts tell domains apart, and what routing by them gains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from memshare.cli.options import count, counts, new_file

_DOMAINS = "solutions,code,prose"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Reads texts of known domains with a mixture of experts, and says how much a chosen expert "
        "tells of its domain, how many distinct experts a step touches whose tokens are of one "
        "domain or of all, and, by simulation, what it gains to send requests to replicas by what "
        "a router knows of them. Runs on the model's routers, without an engine."
    )
    parser.add_argument("model", type=Path, help="folder of a mixture of experts")
    parser.add_argument("--domains", default=_DOMAINS, help=f"of {_DOMAINS} (default: all)")
    parser.add_argument("--texts", type=count, default=120, help="of each domain")
    parser.add_argument("--prompt", type=count, default=96, help="tokens of a text that are given")
    parser.add_argument("--answer", type=count, default=192, help="those behind it")
    parser.add_argument("--replicas", type=counts, default=(2, 4), help="separated by ','")
    parser.add_argument("--running", type=count, default=8, help="requests of each, on average")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument(
        "--popularity", type=new_file, metavar="FILE", help="write what domains choose there, for "
        "tools.bench.moe.affinity",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, and print.

    Raises:
        UserError: there is no such domain, or the model has no experts.
    """
    from memshare.errors import UserError
    from memshare.lab.moe.affinity import AffinitySetup
    from memshare.lab.moe.report import domain_popularity, heads, rules, specialisation
    from memshare.lab.moe.texts import DOMAINS
    from memshare.lab.moe.traces import read_traces

    domains = [name for name in DOMAINS if name in args.domains.split(",")]
    if len(domains) < 2 or len(domains) < len(args.domains.split(",")):
        raise UserError(f"--domains: give two or more of {_DOMAINS}")
    length = args.prompt + args.answer
    traces, experts, loss = read_traces(args.model, domains, args.texts, length)
    print(f"{len(traces)} texts, {loss:.2f} nats a token")
    for line in specialisation(traces, experts, domains):
        print(line)
    print(f"\n{heads()}")
    for replicas in args.replicas:
        shares = (1 / len(domains),) * len(domains)
        setup = AffinitySetup(replicas, args.running, args.prompt, shares)
        for line in rules(traces, experts, setup, args.seeds):
            print(line, flush=True)
    if args.popularity is not None:
        content = {"domains": domains, "popularity": domain_popularity(traces, experts)}
        args.popularity.write_text(json.dumps(content))
    return 0
