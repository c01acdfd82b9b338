"""Files of elsewhere, on this machine."""
