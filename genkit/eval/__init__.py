"""Feature networks and the numbers computed with them."""
