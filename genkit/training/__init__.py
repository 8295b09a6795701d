"""The one training loop: tasks, configuration, data order, EMA, checkpoints, trackers. It knows no system by name."""
