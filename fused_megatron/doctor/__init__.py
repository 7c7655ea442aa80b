"""`fused-megatron doctor`: what is here, what is missing, and the command that mends it. In under 3 seconds.

facts.py says what is looked at, installation.py, machine.py and ranks.py look, findings.py judges, report.py shows.
Nothing here imports torch or another dependency at the top of a file: that one is absent or broken is a finding.
"""
