"""How commands are carried out: processes and GPUs of this machine, nodes that work together, jobs of a Slurm cluster."""
