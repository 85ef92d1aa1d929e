"""What came of runs: their folders, tables, pictures and pages."""
