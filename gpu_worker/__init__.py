"""One process per device: weights, KV cache and adapter pool; runs the steps of the scheduler."""

import os

# How long an OpenMP thread spins before it sleeps; read when torch is loaded. libgomp's own
# 300,000 rounds let a thread hold the core that the thread it waits for needs: with another busy
# process on two cores, steps took 10 to 100 times as long. Not spinning costs a half of the speed.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
