"""Conversations as models read them, and what they write: tools, reasoning, constraints."""
