"""What `longspan evaluate` leaves behind: its directory, comparisons of checkpoints, tables and pages."""
