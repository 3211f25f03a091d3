"""A model that is divided over ranks, as ``memshare moe placement`` divides it: what a step of one
of its replicas takes, by published numbers. Nothing here has been measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from memshare.config import ConfigError
from memshare.lab.simulate.costs import AcceleratorFacts, DoesNotFitError, StepWork
from memshare.moe.placement.model_config import read_shape
from memshare.moe.placement.parallelism import Parallelism
from memshare.moe.placement.proposal import touched
from memshare.moe.placement.ranks import Placement, place
from memshare.moe.placement.traffic import traffic_of

_TOKENS = 4096  # of the step by which a token's share of what ranks send is told


@dataclass(frozen=True, slots=True)
class PlacedCosts:
    """Seconds of a step of one replica, while the others do the same.

    Attributes:
        step: without experts, tokens and context.
        experts: for reading all experts of a rank.
        count: experts of a layer; 1 if there are none.
        chosen: experts of a token.
        replicas: whose tokens meet at the experts.
        token: for each computed token: arithmetic, and what ranks send.
        context: for each token whose KV is read.
    """

    step: float
    experts: float
    count: int
    chosen: int
    replicas: int
    token: float
    context: float

    def seconds(self, work: StepWork) -> float:
        """How long a step takes that does ``work``; all sets of experts are equally likely."""
        read = touched(self.count, self.chosen, work.tokens * self.replicas)
        return (
            self.step + self.experts * read + self.token * work.tokens + self.context * work.context
        )


class PlacedDeployment(AcceleratorFacts):
    """A model by its ``config.json``, divided over accelerators that are given by published
    numbers."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    """As shown in tables."""
    model: Path
    """Its folder, or ``config.json``."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks of a replica."""
    data_parallel_size: PositiveInt = 1
    """Replicas, which share one set of experts."""
    enable_expert_parallel: bool = False
    """Whole experts on each rank."""
    decode_context_parallel_size: PositiveInt = 1
    """Ranks that divide the tokens of the same KV heads."""
    kv_bytes: PositiveInt = 2
    """Bytes a number of the cache."""
    link_gb_s: PositiveFloat
    """Gigabytes a second that each sends to others."""
    step_overhead_s: float = Field(default=0.002, ge=0.0)
    """Seconds of a step for launches and sampling."""

    @property
    def accelerators(self) -> int:
        """All ranks."""
        return self.data_parallel_size * self.tensor_parallel_size

    @cached_property
    def placement(self) -> Placement:
        """What each rank holds.

        Raises:
            ConfigError: the model is not known, or cannot be divided so.
        """
        shape = read_shape(self.model)
        if shape.windowed_layers:
            raise ConfigError(
                f"model = {str(self.model)!r}: some layers keep a window of tokens only, and the "
                "simulated scheduler has one kind of blocks\n"
                "    fix: choose a model without windowed layers"
            )
        parallelism = Parallelism(
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            enable_expert_parallel=self.enable_expert_parallel,
            decode_context_parallel_size=self.decode_context_parallel_size,
        )
        return place(shape, parallelism, self.kv_bytes)

    @property
    def blocks(self) -> int:
        """KV blocks of one replica that fit beside the weights of its fullest rank.

        Raises:
            DoesNotFitError: none do.
        """
        room = 1e9 * (self.memory_gb * self.memory_utilization - self.reserved_gb)
        blocks = min(
            int((room - rank.all_weight_bytes) // (float(rank.kv_bytes) * self.block_size))
            for rank in self.placement.ranks
        )
        if blocks < 1:
            weights = max(rank.all_weight_bytes for rank in self.placement.ranks)
            raise DoesNotFitError(
                f"{self.name}: {weights / 1e9:.0f} GB of weights leave no room for KV in "
                f"{self.memory_gb} GB; divide it over more ranks"
            )
        return blocks

    @property
    def costs(self) -> PlacedCosts:
        """Reads at the memory's speed, operations at the units', traffic at the link's, one after
        the other, by the rank that reads most."""
        placement, shape = self.placement, self.placement.shape
        read = self.bandwidth_gb_s * 1e9 * self.efficiency
        rank = max(placement.ranks, key=lambda rank: rank.all_weight_bytes)
        experts = rank.weight_bytes.get("experts", 0)
        # Of the input's embeddings a step reads a row for each token, and not all.
        rows = rank.weight_bytes["embeddings"] * (0.0 if shape.tied else 0.5)
        sent = traffic_of(shape, placement.parallelism, _TOKENS).sent / _TOKENS
        operations = 2 * shape.active_parameters * self.data_parallel_size / self.accelerators
        return PlacedCosts(
            step=self.step_overhead_s + (rank.all_weight_bytes - experts - rows) / read,
            experts=experts / read,
            count=shape.experts.count if shape.experts else 1,
            chosen=shape.experts.per_token if shape.experts else 1,
            replicas=self.data_parallel_size,
            token=operations / (self.teraflops * 1e12 * self.efficiency)
            + sent / (self.link_gb_s * 1e9 * self.efficiency),
            context=float(rank.kv_bytes) / read,
        )
