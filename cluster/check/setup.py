"""What is to be checked: a Ray Serve file, or vLLM's own options and perhaps a MemShare file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.check.hub import look_at_hub
from cluster.check.machine import Needs, needs_of
from cluster.check.ports import Serving
from cluster.check.progress import Say
from cluster.check.report import CheckFinding
from cluster.config import ClusterArgs, parse_cluster_args
from cluster.guard.config import GuardConfig
from memshare.config import MemShareConfig, load_config
from memshare.errors import UserError
from memshare.extras import require
from memshare.small_model.names import resolve_model


@dataclass(frozen=True, slots=True)
class CheckedSetup:
    """A set-up, its configuration already found to be valid.

    Attributes:
        subject: what the user named.
        engine: vLLM's options, as on its server's command line.
        memshare: MemShare's configuration; with mode ``off``, and no adapters, vLLM runs without
            it.
        needs: what it reserves.
        serving: where it will be served; None for plain vLLM.
        hub: what hinders asking the hub for the model; None if nothing does.
        guard: on quality, if there is one.
    """

    subject: str
    engine: tuple[str, ...]
    memshare: MemShareConfig
    needs: Needs
    serving: Serving | None = None
    hub: CheckFinding | None = None
    guard: GuardConfig | None = None


def read_setup(
    file: Path | None, application: str | None, words: Sequence[str], say: Say
) -> CheckedSetup:
    """Read and validate.

    A Ray Serve file's environment variables (``replica.env``) are set in this process: vLLM reads
    some of its options from there. So is what :func:`cluster.check.hub.look_at_hub` sets.

    Args:
        file: a Ray Serve file or a MemShare file; None leaves MemShare's defaults.
        application: name of the application in a Ray Serve file that has several.
        words: vLLM's options; not with a Ray Serve file.
        say: takes what is looked at.

    Raises:
        ConfigError: a field is wrong; names it, its value and the fix.
        UserError: the file cannot be read, or does not go with the other options.
    """
    document = _read(file) if file is not None else {}
    if "applications" in document:
        if words:
            raise UserError(f"vLLM's options stand in {file}, under 'engine': leave out {words[0]}")
        return _of_serve(str(file), document, application, say)
    if application is not None:
        raise UserError(f"--application: {file} is no Ray Serve file: it has no 'applications'")
    model = _option(words, "--model")
    if not model:
        raise UserError("name the model: memshare check -- --model MODEL, or a Ray Serve file")
    config = load_config({} if file is None else {"config": str(file)})
    subject = "plain vLLM" if file is None else f"plain vLLM, {file}"
    say(f"the model {model}")
    return CheckedSetup(
        subject, tuple(words), config, Needs(), hub=look_at_hub(model, _option(words, "--revision"))
    )


def _of_serve(
    file: str, document: dict[str, Any], application: str | None, say: Say
) -> CheckedSetup:
    require("ray", "a Ray Serve file")
    from ray.serve.schema import ServeDeploySchema

    from cluster.processes.neighbours import BUILD, require_own_namespace
    from cluster.tenancy.exposure import require_keys_beyond_localhost

    try:
        schema = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise UserError(f"Ray Serve does not accept {file}: {error}") from None
    ours = [app for app in schema.applications if app.import_path == BUILD]
    if application is not None:
        ours = [app for app in ours if app.name == application]
    if len(ours) != 1:
        names = ", ".join(app.name for app in schema.applications)
        raise UserError(
            f"{file}: {len(ours)} applications with import_path {BUILD} are meant (applications: "
            f"{names}); choose one with --application"
        )
    cluster = parse_cluster_args(ours[0].args)
    require_keys_beyond_localhost(cluster.auth, schema.http_options.host)
    require_own_namespace(cluster, schema.applications)
    os.environ.update(cluster.replica.env)
    say(f"the model {cluster.model}")
    revision = cluster.engine.extra.get("revision")
    hub = look_at_hub(cluster.model, None if revision is None else str(revision))
    say("the engine's options (loads vLLM)")
    # Only now: it imports vLLM, which takes many seconds and reads the environment.
    from cluster.engine.options import check_engine_options, engine_words

    check_engine_options(cluster)
    say("")  # a model that is made here shows its own progress
    words = engine_words(cluster, resolve_model(cluster.model), cluster.memshare)
    return CheckedSetup(
        f"{file}, {_size(cluster)}", tuple(words), cluster.memshare, needs_of(cluster),
        _serving(schema, ours[0], cluster), hub, cluster.guard,
    )  # fmt: skip


def _serving(schema: Any, application: Any, cluster: ClusterArgs) -> Serving:
    with_grpc = bool(schema.grpc_options.grpc_servicer_functions)
    return Serving(
        application=application.name,
        route=application.route_prefix or "/",
        model=cluster.public_name,
        http=(schema.http_options.host, schema.http_options.port),
        grpc=("0.0.0.0", schema.grpc_options.port) if with_grpc else None,
    )


def _size(cluster: ClusterArgs) -> str:
    ranks = cluster.engine.tensor_parallel_size
    workers = f" of {ranks} workers" if ranks > 1 else ""
    replicas = f"{cluster.replicas} replica{'s' * (cluster.replicas != 1)}{workers}"
    return f"{replicas}, at most {cluster.most_replicas}" if cluster.scaling else replicas


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of one of vLLM's options, before vLLM's own parser can be loaded."""
    for i, word in enumerate(words):
        given, equals, value = word.partition("=")
        if given == name:
            return value if equals else next(iter(words[i + 1 :]), None)
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{file} is neither a Ray Serve file nor a MemShare file: it has no fields")
    return document
