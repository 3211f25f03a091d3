"""Ray Serve's side of :mod:`cluster.routing.scaling`: runs in Ray Serve's controller."""

from __future__ import annotations

import logging
import warnings

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.config import ScalingConfig
from cluster.routing.load import Load
from cluster.routing.scaling import decide

logger = logging.getLogger("ray.serve")  # the controller's log shows no other


class KVPressurePolicy:
    """Autoscaling policy over what replicas report by ``record_autoscaling_stats``."""

    def __init__(self, **config: object) -> None:
        """Take the fields of :class:`~cluster.config.ScalingConfig`."""
        self._config = ScalingConfig.model_validate(config)
        self._target = 0

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """The wanted number, and the state for Ray Serve, which applies the delays."""
        decision = decide(self._config, _loads(context), context.current_num_replicas)
        if decision.replicas not in (self._target, context.target_num_replicas):
            logger.info(
                "MemShare wants %d replicas of %s instead of %d: %s",
                decision.replicas,
                context.deployment_name,
                context.target_num_replicas,
                decision.reason,
            )
        self._target = decision.replicas
        return decision.replicas, {}


def _loads(context: AutoscalingContext) -> list[Load]:
    """Loads of the replicas that have reported all fields."""
    fields = context.aggregated_metrics or {}
    columns = [fields.get(name) or {} for name in Load._fields]
    reported = set(columns[0]).intersection(*columns[1:])
    return [Load(*(column[replica] for column in columns)) for replica in reported]


def autoscaling_config(scaling: ScalingConfig, replicas: int) -> AutoscalingConfig:
    """Autoscaling of a deployment that starts with ``replicas``."""
    with warnings.catch_warnings():
        # Ray Serve wants to have the period in an environment variable of all its processes some
        # day; in 2.60 this field is what it reads.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            # Left out if it says nothing: a rolling update would fall back to it.
            initial_replicas=replicas if replicas > scaling.min_replicas else None,
            max_replicas=scaling.max_replicas,
            upscale_delay_s=scaling.up_delay_s,
            downscale_delay_s=scaling.down_delay_s,
            look_back_period_s=scaling.look_back_s,
            metrics_interval_s=scaling.report_period_s,
            policy=AutoscalingPolicy(
                policy_function=KVPressurePolicy, policy_kwargs=scaling.model_dump()
            ),
        )
