"""Proof that a layout computes what one process computes: on this machine, with gloo ranks and a reduced model.

reduced_config.py makes a config small and keeps its structure. layout_parts.py lists the parts of a layout that can be
switched off. layout_run.py trains the reduced model on the ranks and records every tensor (records.py). comparison.py
compares these records with the records of one process. If they differ, likely_axis.py tries the parts of the layout one
by one. config_check.py verifies a config with these files. user_model.py verifies a user's own module, which
module_run.py trains. verification.py is the result, as a table and as JSON.
"""
