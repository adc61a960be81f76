"""Grafana's board `grafana.json` and Prometheus's alerts `alerts.yml`, as files to copy."""
