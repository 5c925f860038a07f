"""DeepSpeed ZeRO-3 ranks that train the full transformer on the shards of a data set directory."""
