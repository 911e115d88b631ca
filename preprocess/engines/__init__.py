"""Where workers can run: one file each. `preprocess.engine` chooses among them, and keeps them at work."""
