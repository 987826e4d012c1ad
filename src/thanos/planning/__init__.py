"""What a run would take: seconds and bytes by phase."""
