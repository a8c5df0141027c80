"""What a caller touches: the library, requests checked into tasks, and tokens back into text."""
