"""Files with which a scheduler starts a run: Slurm, Kubernetes."""
