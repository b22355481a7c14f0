"""Models: a timm backbone, the decoder, the network that joins them, and the way to one that has been trained."""

from models.network import CamouflageSegmenter, build_model
from models.trained import Transform, load_model

__all__ = ["CamouflageSegmenter", "Transform", "build_model", "load_model"]
