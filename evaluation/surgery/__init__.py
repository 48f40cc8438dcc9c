"""What conversions of a model need to know of it, and what they cost: calibration, similarity, speed."""
