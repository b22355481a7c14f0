"""Models: a timm backbone, the decoder, and the network that joins them."""

from models.network import CamouflageSegmenter, NetworkSettings, build_network

__all__ = ["CamouflageSegmenter", "NetworkSettings", "build_network"]
