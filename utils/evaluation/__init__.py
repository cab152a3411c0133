"""How good models are: features, distances, intervals, and the record of an evaluation."""
