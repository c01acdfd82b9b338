"""What a score store and its samples tell: pages, tables, lines."""
