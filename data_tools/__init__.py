"""Data: RecordIO shards, what can be packed into them, and the loader that reads them."""
