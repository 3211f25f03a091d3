"""Adapters that cannot share, each with the reason and the way out, before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memshare.agents.adapter import Adapter, PeftSettings
from memshare.agents.base import BaseModelFacts
from memshare.config import AgentsConfig, ConfigError

SHAREABLE = ("q_proj", "v_proj")
"""What adapters that share may change: queries are not cached, and of values the base's part and
the low-rank part are cached apart."""

# Settings of peft that change what an adapter computes, in ways that vLLM or sharing cannot follow.
_UNSUPPORTED: dict[str, tuple[Callable[[PeftSettings], object], str]] = {
    "use_dora": (lambda s: s.use_dora, "train it as a plain LoRA adapter, without use_dora"),
    "lora_bias": (lambda s: s.lora_bias, "train it without lora_bias"),
    "bias": (lambda s: s.bias != "none", "train it with bias 'none'"),
    "modules_to_save": (lambda s: s.modules_to_save, "train it without modules_to_save"),
    "alora_invocation_tokens": (
        lambda s: s.alora_invocation_tokens, "train it as a plain LoRA adapter; vLLM has no aLoRA",
    ),
    "layer_replication": (lambda s: s.layer_replication, "train it without layer_replication"),
    "use_bdlora": (lambda s: s.use_bdlora, "train it without use_bdlora"),
    "use_qalora": (lambda s: s.use_qalora, "train it without use_qalora"),
    "fan_in_fan_out": (lambda s: s.fan_in_fan_out, "train it without fan_in_fan_out"),
}  # fmt: skip


def _fault(adapter: Adapter, what: str, fix: str) -> str:
    return f"agents.adapters.{adapter.name}: {what}\n    fix: {fix}"


def adapter_faults(adapter: Adapter, config: AgentsConfig) -> Iterator[str]:
    """Why one adapter cannot share, whatever the others are."""
    settings = adapter.settings
    if settings.peft_type.upper() != "LORA":
        yield _fault(adapter, f"peft_type is {settings.peft_type!r}", "train it as a LoRA adapter")
    for field, (is_set, fix) in _UNSUPPORTED.items():
        if is_set(settings):
            yield _fault(adapter, f"{field} is {getattr(settings, field)!r}", fix)
    others = sorted({m.part for m in adapter.modules} - set(SHAREABLE))
    if others:
        yield _fault(
            adapter,
            f"it changes {', '.join(others)}; agents.scheme {config.scheme!r} wants adapters on "
            f"{' and '.join(SHAREABLE)} alone",
            f"train it with target_modules {list(SHAREABLE)}, or set agents.scheme to 'nonshared'",
        )
    if not adapter.modules:
        yield _fault(adapter, "it changes nothing", "give an adapter that was trained")
    if adapter.rank > config.max_rank:
        yield _fault(
            adapter,
            f"its rank is {adapter.rank}, above agents.max_rank {config.max_rank}",
            "raise agents.max_rank (to at most 64), or train it with a lower r",
        )


def base_faults(adapter: Adapter, base: BaseModelFacts) -> Iterator[str]:
    """Why an adapter does not belong to a base model: the first module that does not fit it."""
    for module in adapter.modules:
        outputs = base.outputs(module.part)
        if module.layer is not None and module.layer >= base.layers:
            what = f"changes layer {module.layer}, and {base.name} has {base.layers} layers"
        elif outputs is not None and (module.inputs, module.outputs) != (base.hidden, outputs):
            what = (
                f"{module.part} goes from {module.inputs} to {module.outputs}, and in {base.name} "
                f"from {base.hidden} to {outputs}"
            )
        else:
            continue
        trained = adapter.settings.base_model_name_or_path
        named = f"; it was trained on {trained}" if trained else ""
        yield _fault(
            adapter, f"it belongs to another base model: it {what}{named}",
            "serve the model that it was trained on, or name another adapter",
        )  # fmt: skip
        return


def family_faults(adapters: Sequence[Adapter], config: AgentsConfig) -> Iterator[str]:
    """Why adapters that could share each for itself cannot do so together."""
    if config.scheme != "base_lr_shared":
        return
    seen: dict[int, tuple[str, Tensor]] = {}
    for adapter in adapters:
        for layer, matrix in sorted(adapter.value_down().items()):
            first, theirs = seen.setdefault(layer, (adapter.name, matrix))
            if not torch.equal(theirs, matrix):
                yield _fault(
                    adapter,
                    f"its A matrix on v_proj differs from that of {first!r} in layer {layer}; with "
                    "agents.scheme 'base_lr_shared' all adapters have the same",
                    f"train it with the A matrices of {first!r}, frozen, or set agents.scheme to "
                    "'stacked'",
                )
                break


def faults_of(
    adapters: Sequence[Adapter], config: AgentsConfig, base: BaseModelFacts | None = None
) -> Iterator[str]:
    """All of the above.

    Args:
        adapters: what a configuration names, read.
        config: its section ``agents``; nothing is refused if it shares nothing.
        base: the base model, if it is known.
    """
    if not config.shares:
        return
    for adapter in adapters:
        yield from adapter_faults(adapter, config)
        if base is not None:
            yield from base_faults(adapter, base)
    yield from family_faults(adapters, config)


def check_adapters(adapters: Sequence[Adapter], config: AgentsConfig) -> None:
    """Refuse what cannot share, as far as the adapters themselves tell.

    Raises:
        ConfigError: lists every fault.
    """
    faults = list(faults_of(adapters, config))
    if faults:
        raise ConfigError("These adapters cannot share:\n" + "\n".join(f"  {f}" for f in faults))
