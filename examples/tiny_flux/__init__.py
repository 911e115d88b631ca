"""How the tiny FLUX in `examples/tiny-flux` is made: `python -m examples.tiny_flux --out examples/tiny-flux`."""
