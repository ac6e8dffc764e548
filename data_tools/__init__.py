"""Documents -> samples -> shards -> packs -> batches; imports nothing of ours."""
