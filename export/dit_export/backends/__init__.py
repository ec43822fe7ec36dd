"""Backends of the engine that run exported graphs. Each is one file, imported when asked for."""
