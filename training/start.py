"""The start of a new run from a trained network: on other data, at another size, with a schedule of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.backbone import embedding_like
from models.hub import read_network
from runtime.checkpoint import CheckpointError, made_by_modified_copy, read_checkpoint, read_weights
from runtime.folder import best_weights
from runtime.sharding import load_whole_state
from runtime.tensors import first_difference

_ARCHITECTURE = ("backbone", "decoder_channels", "zoom")  # settings that decide the shapes


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network in host memory.

    Attributes:
        weights: by name; the averaged ones if there are such.
        settings: those that decide the network's shapes, by name; empty if its file does not tell.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]


def read_trained(source: str) -> TrainedNetwork:
    """Read a trained network. Nothing in its files is executed.

    Args:
        source: a checkpoint, a run's folder, a folder of ``export --format safetensors``, "owner/name" on the Hugging
            Face hub, or a file of weights of this network, in any wrapping that ``read_weights`` knows.

    Raises:
        ValueError: There is no such file, folder or repository, or it holds no weights.
    """
    path = Path(source)
    files = [file for file in best_weights(path) if file.exists()]  # if it is a run's folder
    if len(files) > 1:
        raise CheckpointError(f"--start-from {source}: {len(files)} folds; name one file, such as {files[0]}")
    path = files[0] if files else path
    if path.is_dir() or not path.exists():
        if path.suffix in (".pth", ".pt", ".safetensors", ".ckpt"):
            raise CheckpointError(f"--start-from {source}: no such file")
        config, weights = read_network(source)
        return TrainedNetwork(weights, {**{name: config[name] for name in _ARCHITECTURE[:2]}, "zoom": config["zooms"]})
    if path.suffix == ".safetensors":
        return TrainedNetwork(read_weights(path), {})
    checkpoint = read_checkpoint(path)
    if "config" not in checkpoint:
        return TrainedNetwork(checkpoint["model"], {})
    try:
        average, settings = checkpoint.get("ema"), checkpoint["config"]["settings"]
        weights = checkpoint["model"] if average is None else average["model"]
        return TrainedNetwork(weights, {name: settings[name] for name in _ARCHITECTURE if name in settings})
    except (KeyError, TypeError) as error:
        raise made_by_modified_copy(path, f"{type(error).__name__}: {error}") from error


def start_from(model: nn.Module, trained: TrainedNetwork, source: str) -> list[str]:
    """Load a trained network's weights, part by part: backbone, decoder, zoom. Position embeddings are resized.

    Args:
        model: the network to start, whose parts may differ.
        trained: what to start from.
        source: the value of ``--start-from``, for messages.

    Returns:
        a line for each part that does not fit and keeps its initial weights.

    Raises:
        ValueError: The backbone does not fit; the message names the first difference and a way out.
    """
    expected, lines, fitting = model.state_dict(), list[str](), dict[str, Tensor]()
    for part in dict.fromkeys(map(_part_of, expected)):
        wanted = {name: value for name, value in expected.items() if _part_of(name) == part}
        weights = {
            name: embedding_like(weight, wanted.get(name), name)
            for name, weight in trained.weights.items()
            if _part_of(name) == part
        }
        difference = first_difference(weights, wanted)
        if difference and part == "backbone":
            raise ValueError(f"--start-from {source}: {_of_another(trained, difference)}")
        if difference:
            lines.append(
                f"--start-from {source}: its {part} does not fit and starts afresh ({len(wanted)} tensors; first "
                f"difference: {difference})"
            )
        fitting |= wanted if difference else weights
    load_whole_state(model, fitting)
    return lines


def _part_of(name: str) -> str:
    """Return the network's part that a weight belongs to: backbone, decoder or zoom."""
    return name.partition(".")[0]


def _of_another(trained: TrainedNetwork, difference: str) -> str:
    """Say which network it is instead."""
    if trained.settings:
        return f"a {trained.settings['backbone']}: leave --backbone out, or give this one ({difference})"
    if not any(name.startswith("backbone.") for name in trained.weights):
        return f"not of this program's network ({difference}); weights of a backbone alone are for --backbone-weights"
    return f"its backbone is another one than --backbone's ({difference})"
