"""The live page: a picture of the engine, derived from its events and drawn in a browser."""
