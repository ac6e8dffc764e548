"""Synthetic documents: what stands on them, where, how it is drawn and how it is worn.

Pages (receipts, forms) come out as images and labels in the shape that users' own data has; text
lines come out as shards ready for training. Everything is drawn from seeds.
"""
