"""One process per device: weights, KV cache and adapter pool; runs the steps of the scheduler."""

import os

# An OpenMP thread that spins while it waits takes the core from the thread it waits for whenever
# another process wants one, and a step becomes 10 to 100 times slower. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
