"""The arms of every comparison: plain vLLM, our policies, and honest baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from memshare.config import ConfigError, load_config, registry
from memshare.errors import UserError

# As published: 0.9 for steps, 0.8 for blocks (arXiv 2507.21433).
_PAPER = {
    "policy": {"name": "paper"},
    "steps": {"similarity_threshold": 0.9},
    "distance": {"norm": "paper", "layers": "all", "similarity_threshold": 0.8},
}
POLICIES: dict[str, dict[str, Any]] = {
    "twins": {"policy": {"name": "twins"}},
    "compaction": {"policy": {"name": "compaction"}},
    "oldest": {"policy": {"name": "oldest"}},
    "random": {"policy": {"name": "random"}},
    "paper": _PAPER,
    # Negative control: what `twins` would keep goes first.
    "control": {"policy": {"name": "twins", "order": "least_covered", "min_coverage": 0.0}},
    # Memory before exactness.
    "twins-no-floor": {"policy": {"name": "twins", "min_coverage": 0.0}},
}
"""MemShare's options of every arm of our own that gives up blocks."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: as shown in tables.
        memshare: MemShare's options; None is plain vLLM.
        kv_dtype: vLLM's ``kv_cache_dtype``.
        watermark: vLLM's own: the fraction of its KV blocks that stays free when it admits a
            request, so that fewer are preempted later.
    """

    name: str
    memshare: dict[str, Any] | None
    kv_dtype: str = "auto"
    watermark: float = 0.0

    @property
    def shares(self) -> bool:
        """Whether its requests may give up blocks."""
        return self.memshare is not None and self.memshare.get("mode", "share") == "share"

    def blocks(self, blocks: int, dtype: str) -> int:
        """KV blocks that take the bytes of as many of the model's own type.

        Args:
            blocks: of type ``dtype``, vLLM's null block included.
            dtype: of the model: ``float32``, or a type of 16 bits.
        """
        if self.kv_dtype == "auto":
            return blocks
        return 1 + (blocks - 1) * (4 if dtype == "float32" else 2)  # fp8 is one byte


DENSE = Arm("dense", None)
_OTHERS = {
    "dense": DENSE,
    "off": Arm("off", {"mode": "off"}),
    "observe": Arm("observe", {"mode": "observe"} | POLICIES["twins"]),
    "watermark": Arm("watermark", None, watermark=0.05),
    "fp8": Arm("fp8", None, kv_dtype="fp8"),
}
_FP8 = "-fp8"
NAMES = (*_OTHERS, *POLICIES)
_ON_FP8 = f"or a policy on an fp8 KV cache, as twins{_FP8}"
CHOICES = f"{', '.join(NAMES)}; a policy of an installed package, by its name; {_ON_FP8}"
"""What users may name, for help: the same on every machine."""


def sharing_arms() -> dict[str, dict[str, Any]]:
    """:data:`POLICIES`, and the policies of installed packages with their default parameters.

    An arm of our own keeps its name where a package has one by the same name.
    """
    ours = {registry.AUTO, *registry.BUILT_IN, *NAMES}
    outside = {name: {"policy": {"name": name}} for name in registry.names() if name not in ours}
    return POLICIES | outside


def require_usable(policy: str) -> None:
    """Refuse a policy of another package that cannot run with its defaults, before engines start.

    Raises:
        UserError: its module cannot be imported, is no mechanism, or a parameter has no default.
    """
    if policy in POLICIES:
        return
    try:
        load_config(sharing_arms()[policy], environ={})
    except ConfigError as error:
        raise UserError(f"--arms: {policy}: {error}") from error


def expand(names: str, budgets: list[float], common: dict[str, Any]) -> Iterator[Arm]:
    """Yield the arms that a user names, those that give up blocks once a budget.

    Args:
        names: separated by ``,``. A policy with ``-fp8`` behind it runs on an fp8 KV cache.
        budgets: values of ``budget.max_shared_fraction``, and ``max_dropped_fraction``; none leaves
            each policy its default.
        common: further options of all arms with MemShare.

    Raises:
        UserError: there is no such arm, one comes twice, or its package cannot be used.
    """
    _require_once("--arms", names.split(","))
    _require_once("--budget", [f"{budget:g}" for budget in budgets])
    policies = sharing_arms()
    for name in names.split(","):
        policy = name.removesuffix(_FP8)
        if name in _OTHERS:
            arm = _OTHERS[name]
            yield arm if arm.memshare is None else Arm(name, common | arm.memshare)
        elif policy in policies:
            require_usable(policy)
            kv_dtype = "auto" if policy == name else "fp8"
            options = common | policies[policy]
            if not budgets:
                yield Arm(name, options, kv_dtype)
            for budget in budgets:
                shown = name if len(budgets) == 1 else f"{name} {budget:g}"
                asked = options.get("budget", {}) | limits(budget)
                yield Arm(shown, options | {"budget": asked}, kv_dtype)
        else:
            known = ", ".join((*_OTHERS, *policies))
            raise UserError(f"there is no arm {name!r}; choose of {known}; {_ON_FP8}")


def limits(fraction: float) -> dict[str, float]:
    """Options that let any policy give up a fraction of each request's blocks."""
    return {"max_shared_fraction": fraction, "max_dropped_fraction": fraction}


def _require_once(option: str, values: list[str]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: {twice} comes twice; name it once")


def dropping(arms: Iterable[Arm]) -> str:
    """Say what limits arms that drop tokens, besides their budgets; ``""`` if there are none."""
    limited: dict[tuple[int, float], list[str]] = {}
    for arm in arms:
        if arm.shares:
            config = load_config(arm.memshare, environ={})
            if config.drops_tokens:
                limits = (config.recent_tokens, config.max_thinning)
                limited.setdefault(limits, []).append(arm.name)
    return "".join(
        f" {', '.join(names)}: the last {recent} tokens stay (--recent), and of those between "
        f"prompt and window at most {thinning:g} go (--thinning)."
        for (recent, thinning), names in limited.items()
    )


def wider(arms: Iterable[Arm], blocks: int, dtype: str) -> str:
    """Say which arms hold more than ``blocks`` KV blocks of ``dtype`` in the same bytes; ``""`` if
    none does. vLLM's null block is counted in, and not in the text."""
    counts = {arm.name: arm.blocks(blocks, dtype) for arm in arms}
    return "".join(
        f" {name} has {count - 1} usable blocks in the same bytes."
        for name, count in counts.items()
        if count != blocks
    )


def require_kv_types(arms: Iterable[Arm]) -> None:
    """Refuse arms with an fp8 KV cache where vLLM has none.

    Raises:
        UserError: this CPU lacks what vLLM asks for (its ``v1/attention/backends/cpu_attn.py``).
    """
    narrow = [arm.name for arm in arms if arm.kv_dtype != "auto"]
    if not narrow:
        return
    import torch
    from vllm.platforms import current_platform  # takes seconds, which other arms need not wait

    supported = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    if current_platform.is_cpu() and not supported:
        raise UserError(
            f"--arms: {', '.join(narrow)}: vLLM's fp8 KV cache needs a GPU, or a CPU with AVX-512; "
            "leave them out"
        )
