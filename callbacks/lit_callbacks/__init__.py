"""Lightning callbacks that plug into any project: torch and lightning are all they need."""
