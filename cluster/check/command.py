"""``memshare check``: will this model, machine, version and configuration work together?

Give a Ray Serve file, or a MemShare file and vLLM's own options behind ``--``:

    memshare check configs/cluster.yaml
    memshare check configs/observe.yaml -- --model MODEL --max-model-len 32768

Nothing is started, and of the model only configuration and tokenizer are read. Ray need not run.
What is being looked at goes to standard error. The exit status is 0 if it will work, perhaps with
warnings, and if a MemShare server with this model answers on the ports already; 1 if it will not.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.check.progress import CheckProgress, Say
from cluster.check.report import GIB, Capacity, CheckFinding, CheckReport, Memory
from memshare.config import ConfigError, MemShareConfig
from memshare.errors import UserError

_PROMPT = 200  # tokens
_OUTPUT = 4000  # tokens, at most as many as the model takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, nargs="?", help="Ray Serve file or MemShare file")
    parser.add_argument("vllm", nargs="*", metavar="-- OPTION", help="of vLLM's server")
    parser.add_argument("--application", metavar="NAME", help="in a Ray Serve file with several")
    parser.add_argument("--prompt", type=int, help=f"tokens of a request (default: {_PROMPT})")
    parser.add_argument(
        "--output", type=int, help=f"generated tokens (default: up to {_OUTPUT}, as fits)"
    )
    parser.add_argument(
        "--freed", type=float, metavar="FRACTION",
        help="of a request's blocks that sharing gives up (default: as measured for the policy)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB",
        help="judge for GPUs of this size and not for this machine",
    )  # fmt: skip
    parser.add_argument(
        "--reserve", type=float, default=4.0, metavar="GIB",
        help="of a GPU, for activations and CUDA graphs (default: 4)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check and print.

    Raises:
        UserError: an option cannot be used.
    """
    if args.freed is not None and not 0.0 <= args.freed <= 1.0:
        raise UserError(f"--freed {args.freed:g}: give a fraction from 0 to 1")
    # vLLM looks at these when it is imported; its log must not get into ours.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with CheckProgress() as progress:
        report = check(args, progress.say)
    print(report.as_json() if args.json else report.as_text())
    return 0 if report.works else 1


def check(args: argparse.Namespace, say: Say) -> CheckReport:
    """Look at everything; see :func:`add_arguments`. ``say`` takes what is looked at."""
    say("installed packages")
    from cluster.check.installed import check_installed

    file, words = _split(args.file, args.vllm)
    findings = list(check_installed())
    subject = str(file) if file is not None else "vLLM"
    say(subject)
    try:
        from cluster.check.setup import read_setup

        setup = read_setup(file, args.application, words, say)
    except (ConfigError, UserError) as error:
        findings.append(CheckFinding("configuration", "fail", str(error)))
        return CheckReport(subject, tuple(findings))
    findings.append(CheckFinding("configuration", "ok", _configuration(setup.memshare)))
    if any(finding.level == "fail" for finding in findings):
        return CheckReport(setup.subject, tuple(findings))  # another vLLM may not even import

    from cluster.check.guard import guard_cost
    from cluster.check.machine import check_host_memory, check_machine, look_at_this_machine
    from cluster.check.model import ModelCheck, Place
    from cluster.check.placement import look_at_placement
    from cluster.check.ports import look_at_ports

    say("this machine (loads torch)")
    machine = look_at_this_machine()
    elsewhere, runs = args.gpu_memory is not None, False
    gpu = int(args.gpu_memory * GIB) if elsewhere else min(machine.gpus, default=None)
    model = ModelCheck(setup, Place(gpu, int(args.reserve * GIB), elsewhere), say)
    findings += model.findings()
    if elsewhere:
        findings.append(
            CheckFinding("machine", "warn", "not looked at: --gpu-memory is another one's")
        )
    else:
        findings += check_machine(machine, setup.needs)
        if setup.serving is not None:
            say("the ports")
            found, runs = look_at_ports(setup.serving)
            findings += found
    if model.config is None or model.memory is None:
        return CheckReport(setup.subject, tuple(findings))
    memory, ranks = model.memory, model.config.parallel_config.tensor_parallel_size
    if gpu is None:
        fixed = memory.weight_bytes + memory.lora_bytes + memory.bounds_bytes
        findings += check_host_memory(machine, setup.needs, fixed, memory.kv_bytes, ranks, runs)
    found, capacity = _capacity(
        args, model.memshare, memory, model.config.model_config.max_model_len,
        model.config.scheduler_config.max_num_seqs,
    )  # fmt: skip
    if setup.guard is not None:
        findings.append(guard_cost(setup.guard, capacity, model.config))
    misplaced, placement = look_at_placement(model.config)
    findings += [*misplaced, *found]
    return CheckReport(setup.subject, tuple(findings), memory, capacity, placement)


def _split(file: Path | None, words: list[str]) -> tuple[Path | None, list[str]]:
    """Where only vLLM's options are given, argparse takes the first one for the file."""
    if file is not None and str(file).startswith("-"):
        return None, [str(file), *words]
    return file, words


def _configuration(config: MemShareConfig) -> str:
    if config.agents.shares:
        names = ", ".join(config.agents.adapters)
        return f"mode {config.mode}; {names} share one cache, scheme {config.agents.scheme}"
    if config.mode == "off":
        return "mode off: plain vLLM"
    return f"mode {config.mode}, policy {config.policy.name}, trigger {config.trigger.kind}"


def _capacity(
    args: argparse.Namespace,
    config: MemShareConfig,
    memory: Memory,
    max_model_len: int,
    max_num_seqs: int,
) -> tuple[list[CheckFinding], Capacity]:
    from memshare.config.registry import candidates
    from memshare.core.capacity import RequestShape, concurrency

    prompt = min(_PROMPT, max_model_len // 2) if args.prompt is None else args.prompt
    output = min(_OUTPUT, max_model_len - prompt) if args.output is None else args.output
    if prompt < 1 or output < 1 or prompt + output > max_model_len:
        raise UserError(
            f"--prompt {prompt} and --output {output}: both must be 1 or more, and together "
            f"at most max_model_len ({max_model_len})"
        )
    usual = candidates(config.policy)[0]
    freed = usual.usually_freed(config) if args.freed is None else args.freed
    shape = RequestShape(prompt, output, min(freed, config.max_given_up))
    shares = config.mode == "share" and shape.freed > 0

    plain = concurrency(shape, memory.usable, memory.footprint, max_num_seqs, None)
    shared = (
        concurrency(shape, memory.usable, memory.footprint, max_num_seqs, config)
        if shares
        else None
    )
    return (
        [] if config.agents.shares else list(_pressure(plain.spread, max_num_seqs)),
        Capacity(prompt, output, shape.freed, max_num_seqs, plain, shared),
    )


def _pressure(spread: int, max_num_seqs: int) -> Iterator[CheckFinding]:
    if spread >= max_num_seqs:
        yield CheckFinding(
            "model",
            "warn",
            f"KV memory holds {max_num_seqs} such requests, as many as max_num_seqs allows: memory "
            "is never short, and MemShare has nothing to do",
            "expected with a small load; else raise max_num_seqs, or leave MemShare out",
        )
