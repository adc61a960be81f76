"""Several hosts on one machine: network, Ray clusters on it, and the tests that need them."""
