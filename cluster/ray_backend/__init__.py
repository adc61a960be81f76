"""The fleet on Ray: workers, heartbeats, replacement, weight broadcast, autoscaling."""
