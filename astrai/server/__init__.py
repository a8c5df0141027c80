"""The HTTP edge: text in, text out. The engine behind it speaks token ids."""
