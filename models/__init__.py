"""Models: a timm backbone, the decoder and the network that joins them."""

from models.network import CamouflageSegmenter, build_model

__all__ = ["CamouflageSegmenter", "build_model"]
