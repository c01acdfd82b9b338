"""Where a conversion goes."""
