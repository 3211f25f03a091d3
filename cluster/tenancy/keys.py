"""The key table: which key belongs to which tenant, and what a tenant may do.

One table for HTTP and gRPC, from a YAML file, an environment variable, or both. It holds hashes, no
keys: who reads the file can't use the server. A plain SHA-256 is enough, and right, for keys that
:func:`new_key` makes: 256 random bits can't be guessed, however fast a hash is tried, while a slow
hash (bcrypt, scrypt), made for passwords, would cost every request milliseconds that a flood of
wrong keys could turn against the server.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError

from memshare.config import ConfigError, Section, Whole, explain
from memshare.request_options import RequestOptions

logger = logging.getLogger(__name__)

SEQUENCES_PER_REQUEST = 128
"""The default, with keys and without."""
KEY_PREFIX = "msk_"  # so that a leaked key is recognised by scanners
_HASH_PREFIX = "sha256:"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
KeyHash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class MemSharePermissions(Section):
    """What requests of a tenant may ask of MemShare. By default all that a request can ask for."""

    may_opt_out: bool = True
    """Whether ``memshare: off`` is allowed, which keeps a request's memory from being reclaimed."""
    may_set_thresholds: bool = True
    """Whether ``memshare_step_threshold`` and ``memshare_block_threshold`` are allowed."""
    may_set_fraction: bool = True
    """Whether ``memshare_max_shared_fraction`` and ``memshare_max_kept_tokens`` are allowed."""
    always_exact: bool = False
    """Whether every request of the tenant is served exactly, as if it sent ``memshare: off``."""

    def refused(self, options: RequestOptions) -> str | None:
        """The first option, by name, that a request sets and must not; None if all are allowed."""
        allowed = {
            "memshare": self.may_opt_out or options.enabled,
            "memshare_step_threshold": self.may_set_thresholds,
            "memshare_block_threshold": self.may_set_thresholds,
            "memshare_max_shared_fraction": self.may_set_fraction,
            "memshare_max_kept_tokens": self.may_set_fraction,
            "memshare_usage": True,
        }
        return next((name for name in options.model_fields_set if not allowed[name]), None)


class Tenant(Section):
    """One tenant: keys, limits and permissions. Limits hold for the whole cluster."""

    keys: dict[Name, KeyHash] = Field(min_length=1)
    """Name of each key, for the operator, to ``sha256:`` and its hash. See ``memshare keys``."""
    operator: bool = False
    """Whether the keys also open what is for operators: ``/metrics`` and vLLM's own routes that are
    no inference. Inference routes alone are open to every key."""
    concurrent_requests: Whole | None = Field(default=None, ge=1)
    """HTTP requests and gRPC calls at one time. None has no limit."""
    sequences_per_request: Whole = Field(default=SEQUENCES_PER_REQUEST, ge=1)
    """Sequences (prompts times choices) that one of them may generate."""
    tokens_per_minute: Whole | None = Field(default=None, ge=1)
    """Tokens, of prompts and outputs together, on average; a tenant that was idle may use a
    minute's worth at once. None has no limit."""
    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names, in the API, of the model and adapters that may be used. None allows all."""
    permissions: MemSharePermissions = MemSharePermissions()
    """What requests may ask of MemShare."""


class KeyTable(Section):
    """All tenants. Their names are the values of the metric label ``tenant``."""

    tenants: dict[Name, Tenant] = Field(min_length=1, max_length=4096)
    """Name of each tenant to its keys and limits."""


class KeylessConfig(Section):
    """Bounds while there is no key table. With one, those of its tenants hold instead."""

    sequences_per_request: Whole = Field(default=SEQUENCES_PER_REQUEST, ge=1)
    """Sequences (prompts times choices) that one request may generate."""
    requests_per_connection: Whole = Field(default=128, ge=1)
    """Requests at one time of one connection, in each replica. One of HTTP has a single request at
    a time, one of gRPC as many as its client likes."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a key opens."""

    name: str
    """The tenant's."""
    tenant: Tenant


class Keyring:
    """A key table, arranged to look keys up."""

    def __init__(self, table: KeyTable) -> None:
        self._grants = {
            digest: Grant(name, tenant)
            for name, tenant in table.tenants.items()
            for digest in tenant.keys.values()
        }

    def __len__(self) -> int:
        """Keys in the table."""
        return len(self._grants)

    def find(self, key: str) -> Grant | None:
        """What ``key`` opens; None if it is unknown.

        A hash table may compare in variable time: what it compares is a hash, which nobody can
        steer towards another one.
        """
        return self._grants.get(hash_key(key))


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """The form in which a key stands in a table."""
    return _HASH_PREFIX + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a key table is."""

    file: Path | None
    variable: str | None

    @property
    def exists(self) -> bool:
        """Whether keys are configured at all."""
        return self.file is not None or self.variable is not None

    def read(self, environ: Mapping[str, str] | None = None) -> KeyTable:
        """Read file and variable, and put them together.

        Raises:
            ConfigError: one of them cannot be read or is wrong, or both name a tenant or a key.
        """
        environ = os.environ if environ is None else environ
        tables: list[KeyTable] = []
        if self.file is not None:
            tables.append(parse_table(_text_of(self.file), f"key table {str(self.file)!r}"))
        if self.variable is not None:
            source = f"key table in the environment variable {self.variable}"
            if self.variable not in environ:
                raise ConfigError(
                    f"auth.variable = {self.variable!r}: the replica's environment has no such "
                    "variable\n    fix: set it in replica.env, or in the containers' environment"
                )
            tables.append(parse_table(environ[self.variable], source))
        return _together(tables)


class _UnreadableError(ConfigError):
    """The file is not there, or cannot be read: what it holds is not known."""


class WatchedKeys:
    """The key table of a running replica, looked at again from time to time.

    A changed file takes effect with :meth:`look`. If the new content is wrong, or the file is gone,
    the table stays as it was: a slip of an editor must not lock everybody out, nor let anybody in.
    Running requests go on under the table that admitted them.
    """

    def __init__(self, source: KeySource) -> None:
        """Read the table for the first time.

        Raises:
            ConfigError: it cannot be used.
        """
        self._source = source
        self._seen = self._stamp()
        self._keyring = Keyring(source.read())
        self._told: tuple[object, str] | None = None  # what is refused now

    def find(self, key: str) -> Grant | None:
        """See :meth:`Keyring.find`."""
        return self._keyring.find(key)

    def look(self) -> Literal["used", "refused"] | None:
        """Read the table again if its file has changed: one ``stat`` if it has not.

        A file that could not be read is tried again each time: it may hold a revocation.

        Returns:
            What became of the changed table; None if nothing has changed, or that was told before.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            self._told = None
            return None
        try:
            self._keyring = Keyring(self._source.read())
        except _UnreadableError as error:
            return self._refuse(stamp, error)
        except ConfigError as error:
            self._seen = stamp
            return self._refuse(stamp, error)
        self._seen = stamp
        logger.info("the key table was read again: %d keys", len(self._keyring))
        return "used"

    def _refuse(
        self, stamp: tuple[int, ...] | None, error: ConfigError
    ) -> Literal["refused"] | None:
        refusal = (stamp, str(error))
        if refusal == self._told:
            return None
        self._told = refusal
        logger.error("the changed key table is not used, the old one stays: %s", error)
        return "refused"

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when the file does, also if it is replaced through a symbolic link."""
        if self._source.file is None:
            return None
        try:
            stat = self._source.file.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev)


def parse_table(text: str, source: str) -> KeyTable:
    """Read a table in YAML; ``source`` says where it comes from.

    Raises:
        ConfigError: names each wrong field, its value and the fix.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}\n    fix: correct that line") from None
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{source} holds {'nothing' if values is None else f'a {type(values).__name__}'}\n"
            "    fix: write 'tenants:' at its top level; 'memshare keys new' prints an entry"
        )
    try:
        return KeyTable.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, KeyTable, [source])) from None


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise _UnreadableError(
            f"auth.file = {str(file)!r} cannot be read: {error.strerror}\n"
            "    fix: correct the path, or mount the file on every node that runs replicas"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"auth.file = {str(file)!r} is not UTF-8: {error}\n    fix: save it as UTF-8"
        ) from None


def _together(tables: list[KeyTable]) -> KeyTable:
    tenants: dict[str, Tenant] = {}
    owners: dict[str, str] = {}
    for table in tables:
        for name, tenant in table.tenants.items():
            if name in tenants:
                raise ConfigError(
                    f"tenants.{name} is in auth.file and in auth.variable\n"
                    "    fix: leave it in one of them"
                )
            tenants[name] = tenant
            for key, digest in tenant.keys.items():
                owner = f"tenants.{name}.keys.{key}"
                if digest in owners:
                    raise ConfigError(
                        f"{owner} is the same key as {owners[digest]}\n"
                        "    fix: make another one with 'memshare keys new'"
                    )
                owners[digest] = owner
    return KeyTable(tenants=tenants)
