"""Starting runs: on this machine, over nodes, on Slurm; what they cost, which GPUs they hold."""
