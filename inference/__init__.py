"""Reading documents with an exported model: predict, evaluate; `inference.reader` is the core."""
