"""What attention reads of block tables: entries without holes."""
