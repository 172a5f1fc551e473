"""Packing: images of any source into shards and verification sets."""
