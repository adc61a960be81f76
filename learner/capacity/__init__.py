"""What a run takes of memory and disks: arithmetic on its configuration."""
