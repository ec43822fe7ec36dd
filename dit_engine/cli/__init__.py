"""The commands that make images and train models; `dit_engine.console` has what all share."""
