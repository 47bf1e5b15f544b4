"""Pictures: sources of them, their two views, masks, and batches that are the same for any number of processes."""
