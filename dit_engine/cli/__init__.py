"""Commands: arguments in, Engine out."""
