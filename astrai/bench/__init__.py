"""What is measured. Each benchmark ends in one JSON line with commit, hardware and seed."""
