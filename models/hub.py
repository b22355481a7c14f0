"""Networks in the folder format of the Hugging Face hub: ``config.json`` and ``model.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.backbone import reason_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # huggingface_hub's names
ARCHITECTURE = "CamouflageSegmenter"
_NEEDED = ("backbone", "decoder_channels", "zooms", "img_size", "mean", "std")


def write_network(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder.

    Args:
        folder: the existing folder.
        config: backbone, decoder_channels, zooms, img_size, mean and std, which ``read_network`` requires; other keys
            are written too.
        weights: tensors by name; written contiguous, even if some share memory.
    """
    from safetensors.torch import save

    text = json.dumps({"architectures": [ARCHITECTURE], **config}, indent=2, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    own = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
    # not save_file(): only their owner can read the files it makes
    (folder / WEIGHTS).write_bytes(save(own, metadata={"format": "pt"}))


def read_network(source: str | Path, **hub_options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and weights from a folder or from the hub. Nothing in the files is executed.

    Args:
        source: a folder, or "owner/name" on the hub.
        hub_options: options of ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, local_files_only.

    Raises:
        ValueError: there is no such folder or repository, or it holds no network of this program.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(source)
    if folder.is_dir():
        files = [folder / name for name in (CONFIG, WEIGHTS)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{source}: it holds no {' and no '.join(missing)}; "
                f"train_ultimate.py export --format safetensors writes both"
            )
    else:
        files = [_from_hub(str(source), name, hub_options) for name in (CONFIG, WEIGHTS)]
    try:
        config = json.loads(files[0].read_text(encoding="utf-8"))
        weights = load_file(files[1])
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{source}: damaged ({error})") from error
    missing = [key for key in _NEEDED if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{files[0]}: not of a network of this program: it has no {', '.join(missing)}")
    return config, weights


def _from_hub(repository: str, name: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, name, **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:  # no connection, no such repository, no such name
        raise ValueError(
            f"{repository}: no such folder, and no such repository could be read from the Hugging Face hub "
            f"({reason_of(error)})"
        ) from error
