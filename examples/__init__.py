"""The embedded example: procedural pictures, a tiny FLUX trained on them, a measure of how outlines are followed."""
