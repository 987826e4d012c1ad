"""Models side by side: bytes, speed, quality and texts of each, measured alone, in one table and one page."""
