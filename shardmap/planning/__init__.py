"""Which samples run where: devices, shards, chunks."""
