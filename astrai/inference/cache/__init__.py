"""The paged KV cache: the books (bitmask, pool, prefix, books; no torch) and the storage."""
