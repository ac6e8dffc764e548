"""Starting and chaining jobs; computes nothing itself and imports no tensors."""
