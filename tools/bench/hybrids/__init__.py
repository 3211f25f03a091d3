"""What hybrid models gain."""
