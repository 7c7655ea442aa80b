"""`fused-megatron doctor`: what is installed, what is missing, and the command that mends it, in under 3 seconds.

facts.py defines the facts; installation.py, machine.py, network.py and tokens.py gather them; diagnosis.py turns them
into findings; output_formats.py prints both. No file here imports torch or another dependency at its top: a dependency
that is missing or broken is a finding.
"""
