"""Pure functions from a weight and its statistics to an encoding: no graph, no files, repeatable."""
