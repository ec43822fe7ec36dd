"""This engine inside the objects of other libraries, one module per library."""
