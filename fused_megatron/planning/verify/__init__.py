"""Proof that a layout computes what one process computes: on this machine, with gloo ranks and a reduced model.

reduced_config.py makes a config small and keeps its structure; layout_parts.py lists what of a layout can be switched
off; layout_run.py trains the reduced model on the ranks and records every tensor (records.py); comparison.py holds the
records of a layout to the records of one process; likely_axis.py tries the parts of a layout that differs one by one;
config_check.py and user_model.py (which trains by module_run.py) put these together, for a config and for a user's own
module; verification.py is the result, as a table and as JSON.
"""
