"""Other libraries' objects with this engine inside, one module a library."""
