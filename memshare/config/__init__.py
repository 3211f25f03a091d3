"""The configuration: one typed model, one precedence, one kind of error.

``model`` says what there is to set, ``loader`` where values come from, ``errors`` what a user reads
when one is wrong, ``registry`` which mechanisms the section ``policy`` can name.
"""

from memshare.config.errors import ConfigError, explain
from memshare.config.fields import Fraction, NonEmpty, PolicyParams, Real, Section, Whole
from memshare.config.loader import (
    ENV_FILE,
    ENV_KEY,
    ENV_PREFIX,
    load_config,
    merge,
    without_fields,
)
from memshare.config.model import (
    AdmissionConfig,
    AgentsConfig,
    BudgetConfig,
    DistanceConfig,
    EvaluatorConfig,
    ExpertsConfig,
    IntegrityConfig,
    LogConfig,
    MemShareConfig,
    ProtectConfig,
    ReportConfig,
    StepConfig,
    TriggerConfig,
)
from memshare.config.selection import SelectionConfig
from memshare.config.setup import EngineFacts, Setup

__all__ = [
    "ENV_FILE",
    "ENV_KEY",
    "ENV_PREFIX",
    "AdmissionConfig",
    "AgentsConfig",
    "BudgetConfig",
    "ConfigError",
    "DistanceConfig",
    "EngineFacts",
    "EvaluatorConfig",
    "ExpertsConfig",
    "Fraction",
    "IntegrityConfig",
    "LogConfig",
    "MemShareConfig",
    "NonEmpty",
    "PolicyParams",
    "ProtectConfig",
    "Real",
    "ReportConfig",
    "Section",
    "SelectionConfig",
    "Setup",
    "StepConfig",
    "TriggerConfig",
    "Whole",
    "explain",
    "load_config",
    "merge",
    "without_fields",
]
