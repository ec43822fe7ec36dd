"""Reading and writing: files, pictures, JSON, arrays, text from others."""
