"""A run from its config: the stages of the model and the schedule of the pipeline."""
