"""Plans into launches on a GPU: passes, graphs, uploads, and the state of the slots."""
