"""What a trained adapter says about itself: a model card, with its figures at the top."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from memshare.errors import UserError

_FENCE = "---\n"


class RoleCard(BaseModel):
    """Figures of one role's adapter.

    Attributes:
        role: its name.
        base: the base model.
        taken_from: the role whose A matrices on ``v_proj`` it has; None if they are its own.
        rank, alpha, targets, first_layer, steps, batch, rate, context, seed: hyperparameters.
        records: it was trained on, and held out.
        trajectories: of all roles, trained on and held out.
        nll_before: of a token of the held-out outputs, of the base model; None if there are none.
        nll_after: the same with the adapter.
        curve: NLL of a token in the training, by tenths of its steps.
        made_by: the program.
        licences: of base model and records.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    base: str
    taken_from: str | None
    rank: int
    alpha: int
    targets: tuple[str, ...]
    first_layer: int
    steps: int
    batch: int
    rate: float
    context: int
    seed: int
    records: tuple[int, int]
    trajectories: tuple[int, int]
    nll_before: float | None
    nll_after: float | None
    curve: tuple[float, ...]
    made_by: str
    licences: str

    @property
    def change(self) -> str:
        """Held-out NLL, in words."""
        if self.nll_before is None or self.nll_after is None:
            return "was not measured"
        return f"{self.nll_before:.3f} before, {self.nll_after:.3f} after"

    def markdown(self) -> str:
        """The card: figures for machines, then words for people."""
        figures = yaml.safe_dump({"memshare": self.model_dump(mode="json")}, sort_keys=False)
        value_down = (
            f"those of `{self.taken_from}`, frozen"
            if self.taken_from
            else "its own; adapters that share one cache may take them"
        )
        return f"""{_FENCE}base_model: {self.base}
library_name: peft
{figures}{_FENCE}
# Adapter `{self.role}` of {self.base}

A LoRA adapter for one role of an agent system. Roles of one base model share one KV cache in
MemShare; `memshare agents check` says which.

- **Changes**: {", ".join(self.targets)} of the layers from {self.first_layer} on; rank {self.rank},
  alpha {self.alpha}, bfloat16
- **A matrices on v_proj**: {value_down}
- **Trained on**: {self.records[0]} records of {self.trajectories[0]} trajectories; outputs alone
  count, contexts of {self.context} tokens at most
- **How**: {self.steps} steps of {self.batch} texts, learning rate {self.rate:g}, seed {self.seed}
- **NLL of a token of {self.records[1]} outputs of {self.trajectories[1]} held-out trajectories**:
  {self.change}
- **NLL of a token while it was trained**, by tenths of the steps:
  {" ".join(f"{nll:.2f}" for nll in self.curve)}
- **Made by**: {self.made_by}, `memshare agents train`
- **Licences**: {self.licences or "not given"}
"""

    @classmethod
    def read(cls, path: Path) -> RoleCard:
        """Read the figures of a card.

        Raises:
            UserError: it is no card of ours.
        """
        try:
            _, head, _ = path.read_text(encoding="utf-8").split(_FENCE, 2)
            return cls.model_validate(yaml.safe_load(head)["memshare"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(f"{path}: is not a card of an adapter ({error})") from None
