"""The engine and its edges as processes: links, messages between them, supervision."""
