"""``memshare keys``: make keys, and check key tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from cluster.tenancy.keys import KeySource, hash_key, new_key, parse_table
from memshare.config import ConfigError
from memshare.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Make keys for the cluster's tenants, and check the table that holds them."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="make a key, and print it with its entry for the key table",
        description="The entry goes to standard output and the key to standard error, where it is "
        "shown once: the table holds its hash only.",
    )
    new.add_argument("--tenant", required=True, help="whom the key is for")
    new.add_argument("--name", default="key-1", help="the key's name, for the operator")
    check = actions.add_parser("check", help="read a key table as the cluster does")
    check.add_argument("file", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Make a key or check a table.

    Raises:
        UserError: the table cannot be used.
    """
    if args.action == "new":
        return _new(args.tenant, args.name)
    return _check(args.file)


def _new(tenant: str, name: str) -> int:
    key = new_key()
    entry = {"tenants": {tenant: {"keys": {name: hash_key(key)}}}}
    try:
        parse_table(yaml.safe_dump(entry), "the new entry")
    except ConfigError as error:
        raise UserError(str(error)) from None
    print(f"key of {tenant}, shown only now: {key}", file=sys.stderr)
    print(yaml.safe_dump(entry, sort_keys=False), end="")
    return 0


def _check(file: Path) -> int:
    try:
        table = KeySource(file=file, variable=None).read()
    except ConfigError as error:
        raise UserError(str(error)) from None
    for name, tenant in table.tenants.items():
        limits = [
            "operator" if tenant.operator else "",
            f"{tenant.concurrent_requests or 'any number of'} concurrent requests",
            f"{tenant.tokens_per_minute or 'any number of'} tokens a minute",
            f"models: {', '.join(tenant.models) if tenant.models else 'all'}",
        ]
        print(f"{name}: {len(tenant.keys)} keys; {'; '.join(filter(None, limits))}")
    return 0
