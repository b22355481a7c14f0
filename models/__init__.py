"""Models: a timm backbone, the decoder, the network that joins them, and the way to one that has been trained."""

from evaluation.trained import Transform, load_model
from models.network import CamouflageSegmenter, build_model

__all__ = ["CamouflageSegmenter", "Transform", "build_model", "load_model"]
