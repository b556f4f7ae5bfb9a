"""What was done to a model: plain records, and how they are shown."""
