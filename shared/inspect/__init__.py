"""See into a cache: one self-contained HTML page of what it holds. `python -m shared.inspect --cache CACHE`."""
