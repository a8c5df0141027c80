"""A request's way through the engine: engine → scheduler → cache → runner → sampler → text."""
