"""One server for the tests of this folder; pytest ends it with the package."""
