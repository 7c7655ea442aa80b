"""Parts of a training run, built from its config: mesh, pipeline stages, schedule, executor, optimizer."""
