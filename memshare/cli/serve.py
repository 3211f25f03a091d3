"""``memshare serve``: vLLM's own OpenAI server, with MemShare in it. No Ray.

Every option of ``vllm serve`` may follow the model; ``memshare serve --help=all`` lists them.
MemShare's own fields are set by ``--memshare``, as a YAML file, as JSON, or one by one:

    memshare serve MODEL --memshare.mode observe --memshare.budget.max_shared_fraction 0.1
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from memshare.config import AgentsConfig, ConfigError, MemShareConfig, load_config, merge
from memshare.engine.beside.options import take_beside
from memshare.errors import UserError
from memshare.plug_in import (
    ROLE,
    WORKER_CLASS,
    adapter_options,
    connector_options,
)
from memshare.process_env import engine_env
from memshare.small_model.names import resolve_model

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

_OWN = "fields of MemShare's configuration: a YAML file, a JSON object, or --memshare.FIELD VALUE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is shown as help: the words themselves are read by vLLM's parser."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "memshare serve MODEL [option of vLLM or --memshare ...] ..."
    parser.add_argument("model", metavar="MODEL", help="name, folder or hub id")
    parser.add_argument("--memshare", metavar="FILE_OR_JSON", help=_OWN)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it.

    Args:
        args: ``words``, the command line behind ``memshare serve``.

    Raises:
        UserError: options contradict each other, or MemShare's configuration is wrong.
    """
    os.environ.update(engine_env(os.environ))  # for the engine's processes, which inherit it
    options = parse(args.words)  # loads vLLM

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    configure_logging_from_args(options)
    try:
        ServeSubcommand().validate(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"vLLM does not accept its options: {error}") from None
    ServeSubcommand.cmd(options)
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of ``vllm serve`` that ``words`` amount to, with MemShare plugged in.

    Raises:
        UserError: options contradict each other, or MemShare's configuration is wrong.
        SystemExit: vLLM's parser refuses a word (status 2), or was asked for help.
    """
    # Not vLLM's own `main`: it asks for metadata of a distribution `vllm`, which CPU builds lack.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="memshare")
    serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    serve.usage = "memshare serve MODEL [options]"
    group = serve.add_argument_group("MemShare", "What vLLM's server does not have.")
    # A dotted option reaches us as JSON of its own, as vLLM's parser does with its own options.
    group.add_argument(
        "--memshare", action="append", default=[], type=_fields, metavar="FILE_OR_JSON", help=_OWN
    )
    options = parser.parse_args(["serve", *words])
    assert isinstance(options, argparse.Namespace)
    beside = take_beside(options)
    config, options.kv_transfer_config = _transfer(
        options.kv_transfer_config, options.memshare, beside
    )
    _serve_adapters(options, config.agents)
    options.worker_cls = _worker_class(options.worker_cls)
    _resolve(options)
    return options


def _fields(text: str) -> dict[str, Any]:
    """What one ``--memshare`` says: a ``type`` of ``argparse``."""
    if not text.lstrip().startswith("{"):
        return {"config": text}
    try:
        fields: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text}: is not JSON: {error}") from None
    return fields


def _transfer(
    given: KVTransferConfig | None,
    memshare: Sequence[Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]],
) -> tuple[MemShareConfig, KVTransferConfig]:
    """MemShare's configuration, and vLLM's option for its connector and those beside it; what the
    user has set in that stays."""
    from vllm.config import KVTransferConfig

    base = given or KVTransferConfig()
    if base.kv_role not in (None, ROLE):
        raise UserError(
            f"--kv-transfer-config: kv_role is {base.kv_role!r}, and MemShare moves no KV\n"
            f"    fix: leave the option out, or set kv_role to {ROLE!r}"
        )
    fields = reduce(merge, memshare, dict(base.kv_connector_extra_config))
    try:
        config = load_config(fields)
    except ConfigError as error:
        raise UserError(str(error)) from None
    # Every field: the processes of the engine run what was checked here.
    return config, replace(base, **connector_options(config.model_dump(mode="json"), beside))


def _serve_adapters(options: argparse.Namespace, agents: AgentsConfig) -> None:
    """Let vLLM serve the adapters that MemShare's configuration names, each as a model; what the
    user has set stays, and is checked by the engine."""
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    try:
        wanted = adapter_options(agents)
    except ConfigError as error:
        raise UserError(str(error)) from None
    if not wanted:
        return
    options.enable_lora = True
    options.max_loras = max(options.max_loras, wanted["max_loras"])
    options.max_lora_rank = max(options.max_lora_rank, wanted["max_lora_rank"])
    given = list(options.lora_modules or [])
    named = {module.name for module in given}
    options.lora_modules = given + [
        LoRAModulePath(name=name, path=str(path))
        for name, path in agents.adapters.items()
        if name not in named
    ]


def _worker_class(given: str) -> str:
    if given not in ("auto", WORKER_CLASS):
        raise UserError(
            f"--worker-cls is {given!r}, and MemShare brings a worker class of its own\n"
            "    fix: leave the option out"
        )
    return WORKER_CLASS


def _resolve(options: argparse.Namespace) -> None:
    """Prepare a model that we have a name for; it is served under that name."""
    name = options.model_tag or options.model
    model = resolve_model(name)
    if model != name and not options.served_model_name:
        options.served_model_name = [name]
    options.model_tag = options.model = model
