"""Finding the kernel library and opening sessions with it."""
