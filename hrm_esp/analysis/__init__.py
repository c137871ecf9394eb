"""What plans stand for, and curves of runs."""
