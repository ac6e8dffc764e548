"""Shards -> batches: index, order, plan, collate, execute. Order and plan are pure functions."""
