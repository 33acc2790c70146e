"""Which type each tensor gets, and which weights stay at 16 bits."""
