"""Run a teacher over a corpus once, and store what it says of every sample."""
