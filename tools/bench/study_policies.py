"""What giving up blocks does to a model's next-token distribution, policy by policy, on real texts.

As ``memshare replay``, but without an engine (memshare/lab/replay/prefilled.py), so that an arm
takes seconds a text: for trying policies out.

    python -m tools.bench.study_policies --traces FOLDER

Each file of FOLDER is one JSON object with ``problem`` and ``reasoning`` (text). With --family, the
worked solutions of the test reasoner's problems are read instead, up to where the final sum begins,
and the last column is to be read as: how many answers would stay the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.config import DistanceConfig, MemShareConfig
from memshare.core.token_map import TokenMap
from memshare.lab.bench.models import resolve
from memshare.lab.bench.workloads import Source
from memshare.lab.markdown import table_head, table_row
from memshare.lab.probe.evaluate import Dropping, judge
from memshare.lab.probe.judging import probe_for, scorer_for
from memshare.lab.probe.reader import CacheReader, CacheReading
from memshare.lab.problems import FAMILIES, generate
from memshare.lab.replay.divergence import Divergence
from memshare.lab.replay.prefilled import PrefilledTrace, Reader
from memshare.lab.replay.traces import load_traces
from memshare.mechanisms.compaction.params import CompactionParams
from memshare.mechanisms.compaction.scorers.contract import TokenScorer
from memshare.small_model.reasoner import NAME as REASONER

HEADS = (
    "policy", "given up", "KL", "late KL", "change of NLL", "same top token", "no other token",
)  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "random": {"name": "random"},
    "oldest": {"name": "oldest"},
    "twins": {"name": "twins"},
    "twins age 0": {"name": "twins", "age_weight": 0.0},
    "twins age 0.5": {"name": "twins", "age_weight": 0.5},
    "twins age 1.5": {"name": "twins", "age_weight": 1.5},
    "twins age 2": {"name": "twins", "age_weight": 2.0},
    "twins run 1": {"name": "twins", "shortest_run": 1},
    "twins run 2": {"name": "twins", "shortest_run": 2},
    "twins run 8": {"name": "twins", "shortest_run": 8},
    "twins no floor": {"name": "twins", "min_coverage": 0.0},
    "twins floor 0.1": {"name": "twins", "min_coverage": 0.1},
    "twins floor 0.25": {"name": "twins", "min_coverage": 0.25},
    "control": {"name": "twins", "order": "least_covered", "min_coverage": 0.0},
    "compaction": {"name": "compaction"},
    "compaction recency": {"name": "compaction", "scorer": "recency"},
    # Chance alone: a place has no weight.
    "compaction random": {"name": "compaction", "scorer": "random", "position_weight": 0.0},
}


def traces(reader: Reader, options: argparse.Namespace) -> Iterator[PrefilledTrace]:
    """Yield the recorded texts that are long enough."""
    source = Source(reader.tokenizer, options.limit, options.continuation)
    length = options.prefix + options.continuation
    for trace in load_traces(options.traces):
        prompt = source.chat(trace.problem)
        tokens = [*prompt, *source.ids(trace.reasoning)][:length]
        if len(tokens) == length:
            yield reader.read(prompt, tokens[len(prompt) :], options.prefix)


def solutions(reader: Reader, options: argparse.Namespace) -> Iterator[PrefilledTrace]:
    """Yield worked solutions; the prefix ends with the block in which the last part begins."""
    source = Source(reader.tokenizer, options.limit, options.continuation)
    token_map = TokenMap(options.block_size)
    for seed in range(options.seed, options.seed + options.limit):
        problem = generate(options.family, seed)
        prompt, text = source.chat(problem.prompt), source.ids(problem.solution)
        last = problem.solution.find("Now I add")
        done = source.ids(problem.solution[: last if last > 0 else len(problem.solution) // 2])
        full = token_map.full(len(prompt) + len(done))
        yield reader.read(prompt, text, token_map.first_position(full))


class Compactor:
    """Drops tokens of what has been read, as the policy ``compaction`` chooses them."""

    def __init__(self, model: str, token_map: TokenMap, recent: int) -> None:
        """Load the model: ``model`` is resolved; the others as for :class:`Reader`."""
        self._reader = CacheReader(model)
        self._model, self._map, self._recent = model, token_map, recent
        self._scorers: dict[str, TokenScorer] = {}

    def judge(
        self, prefilled: PrefilledTrace, params: CompactionParams, fraction: float
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Damage (see :meth:`Reader.judge`), and the fraction of the blocks that was freed."""
        full = self._map.full(prefilled.prefix)
        gone = int(fraction * full)
        reading = CacheReading(
            prefilled.tokens, prefilled.prompt, prefilled.prefix,
            prefilled.keys, prefilled.values, prefilled.log_probs,
        )  # fmt: skip
        dropped = self._map.first_position(gone) / prefilled.prefix
        how = Dropping(dropped, self._recent, params.position_weight)
        return judge(self._reader, reading, self._scorer(params), how), gone / full

    def _scorer(self, params: CompactionParams) -> TokenScorer:
        name = params.scorer
        if name not in self._scorers:
            reader, probe = self._reader, None
            if name == "probe":
                _, probe = probe_for(self._model, params.probe, reader)
            self._scorers[name] = scorer_for(name, probe, 1, reader)
        return self._scorers[name]


def main() -> None:
    """Print one table a freed fraction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--traces", type=Path, help="folder with JSON files")
    texts.add_argument("--family", choices=FAMILIES, help="worked solutions of the reasoner")
    parser.add_argument("--model", help="name or folder (default: smollm2-135m, or the reasoner)")
    parser.add_argument("--arms", default=",".join(ARMS), help="separated by ','")
    parser.add_argument("--freed", default="0.25", help="fractions of the prefix's blocks, by ','")
    parser.add_argument("--limit", type=int, default=1000, help="texts")
    parser.add_argument("--seed", type=int, default=20000, help="number of the first problem")
    parser.add_argument("--prefix", type=int, default=2560, help="tokens, of --traces")
    parser.add_argument("--continuation", type=int, default=512, help="tokens, of --traces")
    parser.add_argument("--block-size", type=int, default=32, help="tokens")
    parser.add_argument("--recent", type=int, default=128, help="protect.recent_tokens")
    parser.add_argument("--layers", default=DistanceConfig().layers, help="distance.layers")
    parser.add_argument("--tensors", default=DistanceConfig().tensors, help="distance.tensors")
    parser.add_argument("--kv", choices=("float32", "fp8"), default="float32", help="of the cache")
    options = parser.parse_args()
    arms = [arm.strip() for arm in options.arms.split(",")]
    chosen = {arm: MemShareConfig.model_validate({"policy": ARMS[arm]}).policy for arm in arms}
    compacts = any(isinstance(params, CompactionParams) for params in chosen.values())
    if compacts and options.kv == "fp8":
        parser.error("--kv fp8: compaction is judged over float32 alone; leave its arms out")

    model = options.model or ("smollm2-135m" if options.family is None else REASONER)
    distance = DistanceConfig.model_validate({"layers": options.layers, "tensors": options.tensors})
    reader = Reader(resolve(model), options.block_size, options.recent, distance)
    compactor = (
        Compactor(resolve(model), TokenMap(options.block_size), options.recent)
        if compacts
        else None
    )
    fractions = [float(fraction) for fraction in options.freed.split(",")]
    measured: dict[tuple[float, str], list[npt.NDArray[np.float32]]] = {}
    gone: dict[tuple[float, str], list[float]] = {}
    read = 0
    for exact in (traces if options.family is None else solutions)(reader, options):
        prefilled = exact if options.kv == "float32" else reader.in_fp8(exact)
        for fraction in fractions:
            for arm in arms:
                params = chosen[arm]
                if compactor is not None and isinstance(params, CompactionParams):
                    damage, freed = compactor.judge(prefilled, params, fraction)
                else:
                    prefix = reader.give_up(prefilled, params, fraction)
                    damage = reader.judge(prefilled, prefix.donor_of)
                    freed = len(prefix.donor_of) / prefix.full
                measured.setdefault((fraction, arm), []).append(damage)
                gone.setdefault((fraction, arm), []).append(freed)
        read += 1
        print(f"{read} read", file=sys.stderr, flush=True)
        if read == options.limit:
            break
    for fraction in fractions:
        print(f"\n{read} texts, up to {fraction:.0%} of the blocks given up:\n")
        print(table_head(HEADS))
        for arm in arms:
            damage = Divergence.of(measured[fraction, arm])
            cells = (damage.kl, damage.late_kl, damage.delta_nll, damage.same_top)
            same = sum(bool((text[:, 2] == 1).all()) for text in measured[fraction, arm])
            shown = [f"{mean:.4f} ± {error:.4f}" for mean, error in cells]
            given_up = f"{np.mean(gone[fraction, arm]):.1%}"
            print(table_row([arm, given_up, *shown, f"{same} of {read}"]))


if __name__ == "__main__":
    main()
