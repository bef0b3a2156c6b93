"""The forms of data sets (folders, tars, parquet, hub), each with random access and as shards."""
