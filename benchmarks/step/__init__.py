"""How fast a training step is, and what it holds in memory, beside what it is compared with: `make bench`."""
