"""One Sample becomes one training example: question, pixels, token ids, labels and weights."""
