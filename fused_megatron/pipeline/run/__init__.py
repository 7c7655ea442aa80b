"""The executor and all that it stands on: the only code of the pipeline that touches tensors."""
