"""The APIs that clients speak: bodies in, replies out, one module a dialect."""
