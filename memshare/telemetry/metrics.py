"""All of MemShare's metrics. Counting, exporters, docs/metrics.md and dashboards use this list."""

from __future__ import annotations

from memshare.telemetry.metric import Label, Metric, named
from memshare.telemetry.replica_metrics import REPLICA

COUNTERS = named(
    Metric("steps", "counter", "steps", "reasoning steps finished"),
    Metric(
        "candidates",
        "counter",
        "pairs",
        "candidate pairs that the policy made of stage one's matches",
    ),
    Metric("compared", "counter", "pairs", "pairs compared by stage two"),
    Metric("verified", "counter", "pairs", "pairs whose similarity reached the threshold"),
    Metric("rejected", "counter", "pairs", "pairs whose similarity did not"),
    Metric("applied", "counter", "remaps", "remaps applied"),
    Metric(
        "blocks_reclaimed",
        "counter",
        "blocks",
        "KV blocks returned to the free pool by remaps and compactions",
    ),
    Metric("compactions", "counter", "rounds", "rounds in which a request was compacted"),
    Metric(
        "tokens_dropped",
        "counter",
        "tokens",
        "tokens dropped by compactions, as many in every layer and KV head",
    ),
    Metric(
        "pages_read",
        "counter",
        "pages",
        "pages that requests read while they generated, counted for every layer and KV head, where "
        "pages are [selected](page-selection.md)",
    ),
    Metric(
        "pages_there",
        "counter",
        "pages",
        "pages that they had, counted likewise",
    ),
    Metric(
        "preemptions",
        "counter",
        "preemptions",
        "preemptions that still happened, of requests that MemShare follows",
    ),
    Metric(
        "preemptions_avoided",
        "counter",
        "times",
        "times an allocation found no free block and reclaiming gave it one, or the next step's "
        "demand exceeded the free blocks and reclaiming covered it",
    ),
    Metric(
        "remap_misses",
        "counter",
        "remaps",
        "remaps for a request that a worker did not know; should stay 0",
    ),
    Metric(
        "events_dropped",
        "counter",
        "lines",
        "lines missing from the event log because the disk was too slow",
    ),
    Metric(
        "expert_steps",
        "counter",
        "steps",
        "steps in which every request wrote one token and whose "
        "[experts](moe.md#counting-experts) were counted",
    ),
)
"""Counters of the engine without their own label; present from the start, at zero."""

LABELLED = named(
    Metric(
        "dropped",
        "counter",
        "pairs",
        "pairs, candidate or verified, that were dropped",
        (
            Label(
                "reason",
                {
                    "unknown_request": "stage one named a request that has ended, or two that "
                    "share no history",
                    "unavailable": "one of its blocks is not full, freed, or already re-pointed",
                    "protected": "its target lies in the protected prompt",
                    "stage_two_full": "too many pairs wait for stage two (`distance.max_waiting`)",
                    "stale": "one of its blocks was freed or replaced, or its request preempted or "
                    "finished, in the meantime",
                    "no_gain": "target and donor are the same block, or other entries refer to the "
                    "target, so nothing would be freed",
                    "replaced": "a better donor was found for its target",
                    "preempted": "its request was preempted while it waited",
                    "finished": "its request finished while it waited: it was never needed",
                },
            ),
        ),
    ),
    Metric(
        "steps_dropped",
        "counter",
        "steps",
        "steps that stage one never got",
        (Label("reason", {"queue_full": "the bridge to the evaluators was too slow"}),),
    ),
    Metric(
        "evaluator_faults",
        "counter",
        "faults",
        "faults of evaluators; see [Ray](ray.md#the-evaluator-pool)",
        (
            Label(
                "reason",
                {
                    "dead": "an evaluator crashed, was killed, or can't be reached",
                    "busy": "more than `evaluator.max_pending_calls` calls waited at it",
                    "timeout": "it did not answer within `evaluator.call_timeout_s`",
                    "garbage": "it returned something other than an answer",
                    "error": "it raised an exception",
                },
            ),
        ),
    ),
    Metric(
        "opted_out",
        "counter",
        "requests",
        "requests that MemShare leaves exact",
        (
            Label(
                "reason",
                {
                    "requested": "set `memshare` to `off` in `vllm_xargs`",
                    "invalid_options": "has a wrong `memshare` key or value (plain vLLM only)",
                    "prompt_logprobs": "asks for log-probabilities of its prompt",
                    "resumable": "is a streaming-input request, whose prompt grows",
                    "pooling": "generates nothing",
                },
            ),
        ),
    ),
    Metric(
        "integrity_checks",
        "counter",
        "checks",
        "integrity checks",
        (Label("result", {"passed": "the bookkeeping agrees", "failed": "it does not"}),),
    ),
    Metric(
        "agent_tokens_found",
        "counter",
        "tokens",
        "tokens that an adapter's requests found in the cache and did not compute, where adapters "
        "share it ([agents](agents.md))",
        (Label("adapter"),),
    ),
    Metric(
        "agent_tokens_shared",
        "counter",
        "tokens",
        "those of them that stood in blocks that another adapter wrote",
        (Label("adapter"),),
    ),
    Metric(
        "experts_touched",
        "counter",
        "experts",
        "distinct experts that the tokens of those steps chose, by layer; per step of "
        "`expert_steps` it is what a step reads",
        (Label("layer"),),
    ),
    Metric(
        "expert_tokens",
        "counter",
        "tokens",
        "tokens of those steps, each as often as it chose an expert, by layer; per expert of "
        "`experts_touched` it is how many tokens share one reading",
        (Label("layer"),),
    ),
)
"""Counters of the engine with one label; a series appears when it is first counted."""

GAUGES = named(
    Metric("queue_length", "gauge", "pairs", "verified pairs in the reclaim queue"),
    Metric("pairs_waiting", "gauge", "pairs", "candidate pairs that wait for stage two"),
    Metric(
        "shared_entries",
        "gauge",
        "entries",
        "block-table entries of live requests that are re-pointed now",
    ),
    Metric(
        "holes",
        "gauge",
        "entries",
        "block-table entries of live requests whose block compaction has dropped",
    ),
    Metric("free_blocks", "gauge", "blocks", "free KV blocks"),
    Metric(
        "admission_reserve",
        "gauge",
        "blocks",
        "blocks that admitting a waiting request must leave free; 0 while vLLM alone decides",
    ),
    Metric(
        "sharing_stopped",
        "gauge",
        "0 or 1",
        "1 after a failed integrity check has stopped further remaps",
    ),
    Metric(
        "low_rank_bytes",
        "gauge",
        "bytes",
        "what low-rank columns of adapters that share take of each worker's KV cache, with the "
        "padding that they need",
    ),
)
"""Gauges of the engine without their own label."""

BLOCKS = Metric(
    "blocks",
    "gauge",
    "blocks",
    "KV blocks by what they hold, as last examined (`report.every_s`); the sum is all blocks",
    (
        Label(
            "kind",
            {
                "prompt": "prompt that is protected",
                "recent": "the newest tokens of a request, which are protected",
                "shared": "donors: more than one block-table entry points to them",
                "other": "output that may be given up, and requests that MemShare does not follow",
                "free": "nothing, or prefixes that no request uses now",
            },
        ),
    ),
)
"""KV blocks, with a label of their own."""

EXPERT_SKEW = Metric(
    "expert_load_skew",
    "gauge",
    "times the mean",
    "tokens of the busiest expert as a multiple of the mean, by layer, prompts included; old steps "
    "fade",
    (Label("layer"),),
)
"""Another gauge with a label; there are series when experts are counted."""

HISTOGRAMS = named(
    Metric(
        "distance",
        "histogram",
        "1 - similarity",
        "1 - similarity of the pairs that stage two compared",
        buckets=(0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5),
    ),
    Metric(
        "evaluator_lag_seconds",
        "histogram",
        "seconds",
        "time from a finished step to its candidates",
        buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    ),
    Metric(
        "packing_seconds",
        "histogram",
        "seconds",
        "time that compaction took in a step to choose the tokens that stay and to move them, on "
        "the slowest rank; only steps in which it did",
        buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    ),
)
"""Histograms of the engine."""

METRICS: tuple[Metric, ...] = (
    *COUNTERS.values(), *LABELLED.values(), *GAUGES.values(), BLOCKS, EXPERT_SKEW,
    *HISTOGRAMS.values(), *REPLICA.values(),
)  # fmt: skip
"""All of them."""
