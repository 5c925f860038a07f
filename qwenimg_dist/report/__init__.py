"""What people look at: funnel, tables, curves, one-file HTML. Reads data sets and run directories, writes neither."""
