"""Connections, keys, limits, errors and logs: HTTP without the words of any API."""
