"""The frozen and trained models: loading, call contracts, tiny twins of the real classes."""
