"""How good a model is, on text it has not seen."""

from fastlm.evaluation.perplexity import Result, evaluate

__all__ = ["Result", "evaluate"]
