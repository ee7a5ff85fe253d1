"""What `scripts/gpu_check` runs.

main.py runs sections in child processes and writes the report; checks.py asks whether a backend is right, speed.py
how fast it is; subject.py opens the device and makes the model.
"""
