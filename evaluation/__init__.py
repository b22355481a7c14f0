"""From a checkpoint to predictions and scores. Independent of training/."""
