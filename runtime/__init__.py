"""What any run stands on: machine, processes, files, checkpoints, log. Knows no network, no image and no loss."""
