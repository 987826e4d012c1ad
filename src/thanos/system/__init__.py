"""What the machine gives: memory, disk, devices, threads."""
