"""Which mechanisms there are, by the name that chooses one in the section ``policy``.

Ours are one line each below; packages of others register theirs by an entry point of the group
``memshare.mechanisms``. Nothing is imported before it is named: the evaluators and the command line
must not pay for a mechanism that brings torch along. The table is part of the configuration, not of
``memshare/mechanisms/``, because the configuration is validated by it, and mechanisms build on the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, cast, get_args

from pydantic import Field, TypeAdapter
from pydantic_core import PydanticCustomError

from memshare.config.fields import PolicyParams

if TYPE_CHECKING:
    from memshare.config.model import MemShareConfig
    from memshare.config.setup import Setup
    from memshare.mechanisms.contract import Mechanism

BUILT_IN = {
    "paper": "memshare.mechanisms.step_pairs:StepPairs",
    "oldest": "memshare.mechanisms.baselines:Oldest",
    "random": "memshare.mechanisms.baselines:Random",
    "compaction": "memshare.mechanisms.compaction.mechanism:Compaction",
    "twins": "memshare.mechanisms.twins:Twins",
}
"""Our mechanisms."""
ENTRY_POINTS = "memshare.mechanisms"
"""The entry point group of mechanisms from other packages; an entry's name is the policy's name."""
_PARTS = (
    "params", "searches", "drops_tokens", "edits_view", "refusals", "scheduler_part", "worker_part",
)  # fmt: skip
SELECTION = "page selection"
"""The name of what the section ``selection`` switches on: no policy's."""
_SELECTION = "memshare.mechanisms.selection.mechanism:PageSelection"
AUTO = "auto"
"""The policy of a configuration that names none: the one of :data:`PREFERRED` that suits."""
PREFERRED = ("compaction", "twins")
"""What the policy ``auto`` chooses from, best first. The last one is taken whatever it lacks."""


class AutoParams(PolicyParams):
    """The default: ``compaction`` where a probe fits the model, ``twins`` where none does. It is
    settled when the engine starts, which says so, and why."""

    name: Literal["auto"] = "auto"


class Choice(NamedTuple):
    """The mechanism that runs in an engine.

    Attributes:
        params: its parameters.
        reason: why it was chosen, in words; ``""`` if the configuration names it.
    """

    params: PolicyParams
    reason: str = ""


class UnusableMechanism(ValueError):  # noqa: N818 - a finding about a package, not a fault of ours
    """A mechanism of another package cannot be used. The text names the package and the reason."""


def names() -> tuple[str, ...]:
    """Every name that ``policy.name`` may have."""
    return (AUTO, *BUILT_IN, *_outside())


def mechanism_type(name: str) -> type[Mechanism[Any]]:
    """The mechanism that a name stands for.

    Raises:
        UnusableMechanism: another package's mechanism cannot be imported or is none.
    """
    target = BUILT_IN.get(name)
    if target is None:
        return _from_outside(name)
    return _imported(target)


def mechanism_of(params: PolicyParams) -> Mechanism[Any]:
    """The mechanism that a configuration has chosen, with its parameters."""
    return mechanism_type(params.name)(params)


def params_type(name: str) -> type[PolicyParams]:
    """What the section ``policy`` has where it has this name.

    Raises:
        UnusableMechanism: see :func:`mechanism_type`.
    """
    return AutoParams if name == AUTO else mechanism_type(name).params


def candidates(params: PolicyParams) -> tuple[Mechanism[Any], ...]:
    """The mechanisms of which one will run, best first: one, unless the policy is ``auto``."""
    if not isinstance(params, AutoParams):
        return (mechanism_of(params),)
    return tuple(mechanism_of(params_type(name)(name=name)) for name in PREFERRED)


def settle(setup: Setup) -> Choice:
    """Which mechanism runs in an engine.

    Args:
        setup: whose engine is known; while it is not, ``auto`` is its last choice.
    """
    if not isinstance(setup.config.policy, AutoParams):
        return Choice(setup.config.policy)
    *better, last = candidates(setup.config.policy)
    lacks = []
    for mechanism in better:
        why_not = mechanism.shortcoming(setup)
        if why_not is None:
            return Choice(mechanism.chosen, f"it suits {_served(setup)}")
        lacks.append(f"{mechanism.chosen.name}: {why_not}")
    return Choice(last.chosen, "; ".join(lacks))


def _served(setup: Setup) -> str:
    return "this engine" if setup.engine is None else setup.engine.model


def mechanisms_of(config: MemShareConfig) -> dict[str, Mechanism[Any]]:
    """The mechanisms that run under a configuration that is settled, by name: the one that it calls
    its policy, and page selection if that is on."""
    found = {config.policy.name: mechanism_of(config.policy)}
    if config.selection.on:
        found[SELECTION] = _imported(_SELECTION)(config.selection)
    return found


def built_in_params() -> tuple[type[PolicyParams], ...]:
    """The parameters of our own policies: what the documentation describes."""
    return tuple(params_type(name) for name in (AUTO, *BUILT_IN))


def default_policy() -> PolicyParams:
    """The section ``policy`` of a configuration that has none."""
    return AutoParams()


def read_policy(value: object) -> object:
    """Validate the section ``policy`` by the parameters of the mechanism that it names.

    Raises:
        ValueError: pydantic's own errors, as of any union whose member is told by ``name``.
    """
    if isinstance(value, PolicyParams):
        return value
    name = value.get("name") if isinstance(value, Mapping) else None
    outside = name if isinstance(name, str) and name in _outside() else None
    if isinstance(name, str) and name not in names() and _outside():
        expected = ", ".join(repr(known) for known in names())
        raise PydanticCustomError(
            "union_tag_invalid",
            "Input tag '{tag}' found using 'name' does not match any of the expected tags: "
            "{expected}",
            {"tag": name, "expected": expected},
        )
    return _union(outside).validate_python(value)


def _imported(target: str) -> type[Mechanism[Any]]:
    module, _, attribute = target.partition(":")
    return cast("type[Mechanism[Any]]", getattr(import_module(module), attribute))


@cache
def _union(outside: str | None) -> TypeAdapter[Any]:
    """The parameters of our mechanisms, and of one of others, told apart by their names."""
    members = built_in_params()
    if outside is not None:
        members = (*members, mechanism_type(outside).params)
    union: Any = Annotated[Union[members], Field(discriminator="name")]  # noqa: UP007
    return TypeAdapter(union)


@cache
def _outside() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    return {name: entry for name, entry in found.items() if name not in (AUTO, *BUILT_IN)}


@cache
def _from_outside(name: str) -> type[Mechanism[Any]]:
    entry = _outside()[name]
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        found = entry.load()
    except Exception as error:  # whatever a stranger's module raises
        raise UnusableMechanism(
            f"policy {name!r} of the package {package} cannot be imported ({error!r}); repair or "
            "remove that package, or choose another policy"
        ) from error
    missing = [name for name in _PARTS if not hasattr(found, name)]
    if missing:
        raise UnusableMechanism(
            f"policy {name!r} of the package {package}: {entry.value} has no {', '.join(missing)}; "
            "it must be a subclass of memshare.mechanisms.contract.Mechanism"
        )
    if get_args(found.params.model_fields["name"].annotation) != (name,):
        raise UnusableMechanism(
            f"policy {name!r} of the package {package}: its params must have the field "
            f"name: Literal[{name!r}]"
        )
    return cast("type[Mechanism[Any]]", found)


def forget_packages() -> None:
    """Look for entry points anew: packages have been installed or removed since."""
    for cached in (_union, _outside, _from_outside):
        cached.cache_clear()
