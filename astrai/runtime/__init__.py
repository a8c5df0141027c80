"""Plans into kernels: models, memory, sampling and launches of one device."""
