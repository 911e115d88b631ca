"""The cache: layers of tensors on disk, written once and read by every experiment. Knows no model family.

The contract is `cache_schema.md`.
"""
