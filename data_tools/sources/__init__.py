"""What can be packed: folders, lists, archives, record files, shards."""
