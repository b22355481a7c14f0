"""Evaluation: from a checkpoint to predictions and scores. Independent of training/."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.trained import Transform, load_model

__all__ = ["Transform", "load_model"]


def __getattr__(name: str) -> Any:
    """Import torch only when a network is asked for: scoring saved predictions does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluation import trained

    return getattr(trained, name)
