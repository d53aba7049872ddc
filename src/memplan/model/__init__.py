"""The model: from what a job names to every parameter tensor, without importing transformers."""

from memplan.model.architecture import Architecture, Buffer, LinearModule, Parameter
from memplan.model.catalogue import CatalogueEntry, list_models
from memplan.model.config import architecture_from_config
from memplan.model.resolve import ResolvedConfig, resolve_config, resolve_model
from memplan.model.tensors import buffers, linear_modules, num_parameters, parameters

__all__ = [
    "Architecture",
    "Buffer",
    "CatalogueEntry",
    "LinearModule",
    "Parameter",
    "ResolvedConfig",
    "architecture_from_config",
    "buffers",
    "linear_modules",
    "list_models",
    "num_parameters",
    "parameters",
    "resolve_config",
    "resolve_model",
]
