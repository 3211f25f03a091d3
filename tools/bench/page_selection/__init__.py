"""What page selection is worth: quality beside recency at equal pages, and time."""
