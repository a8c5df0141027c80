"""Readers of the event log: nothing here is imported by the engine."""
