"""Trains adapters for roles, from records to folders that engines load."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from memshare import __version__
from memshare.agents.adapter import WEIGHTS
from memshare.agents.base import identity_of, read_facts
from memshare.config import ConfigError
from memshare.errors import UserError
from memshare.lab.agents.card import RoleCard
from memshare.lab.agents.fit import Fit, Text, drawn, fit, mean_nll, new_adapter
from memshare.lab.agents.layers import layers_from, states_below
from memshare.lab.agents.passes import Pass, make_passes
from memshare.lab.agents.records import Split, read_records, split
from memshare.small_model.names import quiet_transformers, resolve_model, tokenizer_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PLAN = "training.json"
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What to train.

    Attributes:
        base: name, folder or hub id of the base model.
        roles: file of records of each role; the first trains the A matrices on ``v_proj``.
        output: folder for a folder of each role.
        shared: whether the others take the first role's A matrices on ``v_proj``, and leave them.
        how: hyperparameters.
        held_out: fraction of the trajectories that no role trains on.
        device: as torch names it.
        dtype: of the base model while it trains.
        licences: of model and records, for the cards.
    """

    base: str
    roles: dict[str, Path]
    output: Path
    shared: bool
    how: Fit
    held_out: float
    device: str
    dtype: Literal["float32", "bfloat16"]
    licences: str


def train(plan: TrainingPlan) -> list[RoleCard]:
    """Train an adapter for each role, with progress; return the cards.

    A run that was ended goes on where it stopped, and ends with the same adapters.

    Raises:
        UserError: base model, records or output cannot be used. Nothing is loaded before that.
    """
    records = {role: read_records(path) for role, path in plan.roles.items()}
    parts = split(records, plan.held_out)
    model = resolve_model(plan.base)
    _require_base(plan, model)
    tokenizer = tokenizer_of(model, "--base")
    _begin(plan, model, parts)
    base, cards = None, []
    for number, role in enumerate(plan.roles):
        if not (plan.output / role).is_dir():
            base = _load_base(plan, model) if base is None else base
            _train_role(plan, role, number, base, tokenizer, parts)
        cards.append(RoleCard.read(plan.output / role / _CARD))
    shutil.rmtree(plan.output / ".work", ignore_errors=True)
    return cards


def _require_base(plan: TrainingPlan, model: str) -> None:
    """Refuse what is no base model for the plan, as far as its configuration tells.

    Raises:
        UserError: it is a folder without a configuration that we can read, or has too few layers.
    """
    if Path(model).is_dir():
        try:
            layers = read_facts(Path(model)).layers
        except ConfigError as error:
            raise UserError(f"--base {plan.base}: {error}") from None
        if plan.how.first_layer >= layers:
            raise UserError(
                f"--first-layer {plan.how.first_layer}: {plan.base} has {layers} layers, counted "
                "from 0"
            )


def _begin(plan: TrainingPlan, model: str, parts: Split) -> None:
    """Make the output folder, or see that it is of the same plan.

    Raises:
        UserError: it holds something else, or what was trained is complete.
    """
    file = plan.output / _PLAN
    wanted = _described(plan, model, parts)
    if not file.is_file():
        if plan.output.exists() and (not plan.output.is_dir() or any(plan.output.iterdir())):
            raise UserError(f"--output {plan.output} exists; name a new folder")
        (plan.output / ".work").mkdir(parents=True)
        file.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    begun = json.loads(file.read_text())
    changed = sorted(k for k in begun.keys() | wanted.keys() if begun.get(k) != wanted.get(k))
    if changed:
        raise UserError(
            f"--output {plan.output} was begun with another {', '.join(changed)}; finish it with "
            "what it was begun with, or name a new folder"
        )
    if all((plan.output / role).is_dir() for role in plan.roles):
        raise UserError(f"--output {plan.output} is complete; name a new folder")
    logger.info("going on with %s", plan.output)


def _described(plan: TrainingPlan, model: str, parts: Split) -> dict[str, Any]:
    """All that the adapters depend on, as JSON holds it."""
    described = asdict(plan.how) | {
        "base": identity_of(model),
        "roles": {role: _digest(plan, parts, role) for role in plan.roles},
        "shared": plan.shared,
        "device": plan.device,
        "dtype": plan.dtype,
    }
    found: dict[str, Any] = json.loads(json.dumps(described))
    return found


def _digest(plan: TrainingPlan, parts: Split, role: str) -> str:
    rows = [[record.input, record.output] for record in (*parts.seen[role], *parts.held_out[role])]
    text = json.dumps([len(parts.seen[role]), rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _load_base(plan: TrainingPlan, model: str) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, plan.dtype)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--base {plan.base}: it cannot be loaded: {reason}") from None
    return loaded.to(plan.device)


def _train_role(
    plan: TrainingPlan,
    role: str,
    number: int,
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    parts: Split,
) -> None:
    """Train one role's adapter; its folder appears whole or not at all."""
    seen, unseen = (
        make_passes(records[role], tokenizer, plan.how.context)
        for records in (parts.seen, parts.held_out)
    )
    logger.info("%s: %d records in %d passes", role, len(parts.seen[role]), len(seen))
    before = _before(plan, role, base, unseen)
    seed = plan.how.seed + number
    first = next(iter(plan.roles))
    taken = plan.shared and role != first and "v_proj" in plan.how.targets
    shared = _value_down_of(plan.output / first) if taken else None
    texts = _texts(plan, role, seed, base, seen)
    adapter = new_adapter(base, plan.how, seed, shared)
    try:
        state = plan.output / ".work" / f"{role}.state"
        with layers_from(base, plan.how.first_layer):
            losses = fit(adapter, texts, plan.how, seed, state, f"{role}, training")
        after = mean_nll(adapter, unseen, f"{role}, after") if unseen else None
        card = _card(plan, role, parts, losses, (before, after), first if taken else None)
        _write(plan, role, adapter, card)
    finally:
        adapter.unload()
    logger.info("%s: NLL of a held-out token %s", role, card.change)


def _texts(plan: TrainingPlan, role: str, seed: int, base: Any, seen: Sequence[Pass]) -> list[Text]:
    """What a role is trained on, as its lowest layer with an adapter reads it. Texts that no step
    draws are not read."""
    if not plan.how.first_layer:
        return [(one, None) for one in seen]
    file = plan.output / ".work" / f"{role}.below"
    used = {number: seen[number] for number in drawn(len(seen), plan.how, seed)}
    states = states_below(base, used, plan.how.first_layer, file, f"{role}, layers below")
    return [(one, states.get(number)) for number, one in enumerate(seen)]


def _before(plan: TrainingPlan, role: str, base: Any, unseen: Sequence[Pass]) -> float | None:
    """The base model's NLL on a role's held-out records, measured once."""
    if not unseen:
        return None
    file = plan.output / ".work" / f"{role}.before"
    if not file.exists():
        file.write_text(json.dumps(mean_nll(base, unseen, f"{role}, before")))
    found: float = json.loads(file.read_text())
    return found


def _value_down_of(folder: Path) -> dict[str, Tensor]:
    """A role's A matrices on ``v_proj``, by the names of peft's parameters."""
    from safetensors.torch import load_file

    return {
        name.replace("lora_A.weight", "lora_A.default.weight"): tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
        if "v_proj.lora_A" in name
    }


def _card(
    plan: TrainingPlan,
    role: str,
    parts: Split,
    losses: Sequence[float],
    nll: tuple[float | None, float | None],
    taken_from: str | None,
) -> RoleCard:
    return RoleCard(
        role=role,
        base=plan.base if not Path(plan.base).is_dir() else Path(plan.base).name,
        taken_from=taken_from,
        rank=plan.how.rank,
        alpha=plan.how.alpha,
        targets=plan.how.targets,
        first_layer=plan.how.first_layer,
        steps=plan.how.steps,
        batch=plan.how.batch,
        rate=plan.how.rate,
        context=plan.how.context,
        seed=plan.how.seed,
        records=(len(parts.seen[role]), len(parts.held_out[role])),
        trajectories=parts.trajectories,
        nll_before=nll[0],
        nll_after=nll[1],
        curve=_tenths(losses),
        made_by=f"MemShare {__version__}",
        licences=plan.licences,
    )


def _tenths(losses: Sequence[float]) -> tuple[float, ...]:
    """Means of ten parts of a training, or of its steps if there are fewer."""
    parts = np.array_split(np.array(losses), min(10, len(losses)))
    return tuple(round(float(part.mean()), 3) for part in parts)


def _write(plan: TrainingPlan, role: str, adapter: PeftModel, card: RoleCard) -> None:
    """Write an adapter in bfloat16, with its card."""
    from safetensors.torch import load_file, save_file

    partial = plan.output / ".work" / f"{role}.{os.getpid()}"
    settings: Any = adapter.peft_config["default"]
    settings.base_model_name_or_path = card.base  # no folder of this machine
    settings.target_modules = sorted(settings.target_modules)  # a set has no order
    adapter.save_pretrained(str(partial), save_embedding_layers=False)
    weights = load_file(partial / WEIGHTS)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(narrow, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / _CARD).write_text(card.markdown(), encoding="utf-8")
    partial.replace(plan.output / role)
