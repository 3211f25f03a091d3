"""From the application's arguments to vLLM's own, checked by vLLM's own parser."""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cluster.config import ClusterArgs, EngineConfig, ExtraValue
from memshare.config import AgentsConfig, ConfigError, MemShareConfig
from memshare.plug_in import WORKER_CLASS, adapter_options, connector_options, host_memory

# Options that `engine.extra` may not set, and where they belong.
_ELSEWHERE = {
    "model": "set 'model' of the application",
    "served_model_name": "set 'served_model_name' of the application",
    "kv_transfer_config": "leave it out: MemShare's connector takes this place; to keep prompts in "
    "host memory, set 'kv_offloading_size'",
    "worker_cls": "leave it out: MemShare's worker class takes this place",
    "host": "set 'http_options.host' of the Ray Serve config file",
    "port": "set 'http_options.port' of the Ray Serve config file",
    "root_path": "set 'route_prefix' of the application",
    "api_server_count": "set 'replicas' of the application",
    "data_parallel_size": "set 'replicas' of the application",
    "config": "write the options of that file under 'engine'",
    "grpc": "leave it out: replicas are served by Ray Serve",
    "headless": "leave it out: replicas are served by Ray Serve",
    "ssl_certfile": "end TLS before Ray Serve: replicas speak plain HTTP",
    "ssl_keyfile": "end TLS before Ray Serve: replicas speak plain HTTP",
    "ssl_ca_certs": "end TLS before Ray Serve: replicas speak plain HTTP",
    "api_key": "set 'auth' of the application: its keys hold for HTTP and gRPC",
    "uds": "leave it out: replicas are served by Ray Serve",
}

_HOST_MEMORY = "kv_offloading_size"  # which makes a connector of its own, beside ours

# Options of vLLM that say how it logs; without them it follows `memshare.telemetry.logs`.
_OWN_LOGGING = {"logging_config", "log_config_file"}


class _RefusedError(ValueError):
    """vLLM's parser refused an argument."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, which raises where it would end the process."""

    def __init__(self) -> None:
        super().__init__(prog="vLLM", allow_abbrev=False)  # type: ignore[no-untyped-call]

    def error(self, message: str) -> NoReturn:
        raise _RefusedError(message)

    @property
    def option_names(self) -> set[str]:
        return {
            option.removeprefix("--").replace("-", "_")
            for option in self._option_string_actions
            if option.startswith("--") and not option.startswith("--no-")
        }


def check_engine_options(args: ClusterArgs) -> None:
    """Check everything that vLLM can check without the model.

    Raises:
        ConfigError: names the field, its value and the fix; of adapters, also that one cannot be
            read, or cannot share.
    """
    parser = _parser()
    known = parser.option_names
    typed = set(EngineConfig.model_fields)
    for raw, value in args.engine.extra.items():
        name = _plain(raw)
        if name in _ELSEWHERE:
            raise _wrong(raw, value, "is not an engine option here", _ELSEWHERE[name])
        if name in typed:
            raise _wrong(raw, value, "has a field of its own", f"set 'engine.{name}'")
        if name not in known:
            close = difflib.get_close_matches(name, known | typed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see `vllm serve --help=all`"
            raise _wrong(raw, value, "vLLM has no such option", hint)
        try:
            _parse(parser, _flag(name, value))
        except _RefusedError as refused:
            raise _wrong(raw, value, str(refused), "give a value that vLLM accepts") from None
    try:
        validate_parsed_serve_args(_parse(parser, engine_words(args, args.model, args.memshare)))
    except ConfigError:
        raise
    except (_RefusedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"vLLM does not accept the engine's options: {error}\n"
            "    fix: correct the option that it names under 'engine'"
        ) from None


def parse_engine_options(args: ClusterArgs, model: str, config: MemShareConfig) -> Namespace:
    """The arguments of vLLM's OpenAI server for one replica.

    Args:
        args: the application's arguments, checked before by :func:`check_engine_options`.
        model: folder or Hugging Face id that ``args.model`` stands for on this machine.
        config: MemShare's configuration on this machine.
    """
    return _parse(_parser(), engine_words(args, model, config))


def parse_words(words: Sequence[str]) -> Namespace:
    """Options of vLLM's OpenAI server, as on its command line.

    Raises:
        ConfigError: vLLM's parser refuses one.
    """
    try:
        return _parse(_parser(), list(words))
    except (_RefusedError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM does not accept its options: {error}") from None


def _parser() -> _Parser:
    parser = _Parser()
    make_arg_parser(parser)
    return parser


def _parse(parser: _Parser, argv: list[str]) -> Namespace:
    options = parser.parse_args(argv)
    assert isinstance(options, Namespace)
    return options


def engine_words(args: ClusterArgs, model: str, config: MemShareConfig) -> list[str]:
    """The arguments of vLLM's OpenAI server for one replica, before any parser has seen them.

    Args:
        args: the application's arguments.
        model: folder or Hugging Face id that ``args.model`` stands for on this machine.
        config: MemShare's configuration on this machine.

    Raises:
        ConfigError: an adapter cannot be read, or cannot share.
    """
    argv = ["--model", model, "--served-model-name", args.public_name]
    for name, value in args.engine.model_dump(exclude={"extra"}, exclude_none=True).items():
        argv += _flag(name, value)
    host_gib = None
    for name, value in args.engine.extra.items():
        if args.uses_memshare and _plain(name) == _HOST_MEMORY:
            host_gib = float(value)
        else:
            argv += _flag(name.removeprefix("--"), value)
    if config.logs.format == "json" and _names(args).isdisjoint(_OWN_LOGGING):
        argv.append("--logging-config.formatter=json")
    if args.uses_memshare:
        beside = [] if host_gib is None else [host_memory(host_gib)]
        argv += ["--kv-transfer-config", _connector(config, beside), "--worker-cls", WORKER_CLASS]
        argv += ["--no-async-scheduling"] if beside else []
    return argv + _adapter_words(config.agents)


def _adapter_words(agents: AgentsConfig) -> list[str]:
    """Let vLLM serve each adapter as a model."""
    options = adapter_options(agents)
    if not options:
        return []
    modules = [json.dumps({"name": n, "path": str(p)}) for n, p in agents.adapters.items()]
    words = [word for name, value in options.items() for word in _flag(name, value)]
    return [*words, "--lora-modules", *modules]


def _names(args: ClusterArgs) -> set[str]:
    return {_plain(name) for name in args.engine.extra}


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _flag(name: str, value: ExtraValue) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    # One word, so that a value that starts with a dash is not taken for an option.
    return [f"--{option}={value}"]


def _connector(config: MemShareConfig, beside: Sequence[Mapping[str, Any]]) -> str:
    """vLLM's ``--kv-transfer-config``.

    Holds every field, so that files and variables on the replica's machine can't change what was
    validated when the application was built.
    """
    return json.dumps(connector_options(config.model_dump(mode="json"), beside))


def _wrong(name: str, value: ExtraValue, what: str, fix: str) -> ConfigError:
    return ConfigError(f"engine.extra.{name} = {value!r}: {what}\n    fix: {fix}")
