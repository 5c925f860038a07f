"""The data contract: facets, shards, index, buckets and the ledger that orders samples."""
