"""How good are generated images? A judge of real images, the metrics on what it sees, and the scorecard."""
