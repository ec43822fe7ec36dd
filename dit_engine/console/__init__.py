"""What all commands share: parser, one-line errors, output paths."""
