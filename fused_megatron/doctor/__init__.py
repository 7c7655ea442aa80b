"""`fused-megatron doctor`: what is installed, what is missing, and the command that mends it, in under 3 seconds.

facts.py defines the facts; installation.py, machine.py, buses.py, network.py and tokens.py gather them; diagnosis.py
and gpu_diagnosis.py turn them into findings; output_formats.py prints both. On a machine with GPUs, gpu_trials.py and
op_trials.py use them, which takes longer. No other file imports torch or another dependency at its top: a dependency
that is missing or broken is a finding.
"""
