"""Reading and writing: files, pictures, JSON, arrays, text of others."""
