"""One process per device: weights, KV cache and adapter pool; runs the steps of the scheduler."""

import os

# How long an OpenMP thread spins before it sleeps; read when torch is loaded. libgomp's own
# 300,000 rounds let a thread hold the core that the thread it waits for needs: with another busy
# process on two cores, steps took 10 to 100 times as long. Not spinning costs a half of the speed.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# How many primitives oneDNN keeps, and how many of its own things the layer above it: one for
# each layer's shape and number of tokens, of half a megabyte to more than one. Their own limit of
# 1024 is a gigabyte of a worker on a CPU. Making one anew takes about a millisecond.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "256")
