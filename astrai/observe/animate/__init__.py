"""A recording as a short film: what the scheduler and the books of that run did."""
