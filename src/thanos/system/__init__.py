"""Access to the machine: memory, disk, devices, threads."""
