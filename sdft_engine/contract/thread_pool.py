"""How the threads of a process that trains wait for work. Torch's thread pool reads its environment once, when torch is imported."""

TRAINING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""Idle threads sleep, or they would take the cores from other processes. But first they wait some 50 us at most for the step's
next operation: waking them takes as long, thousands of times a step. What the environment says already stays."""
