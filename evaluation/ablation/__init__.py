"""The report of `longspan uptrain`: a grid of conversions, from its files."""
