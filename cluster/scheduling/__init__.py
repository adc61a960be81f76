"""Decisions of the fleet on plain data, without Ray: workers, requests, weights, retries."""
