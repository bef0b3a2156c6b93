"""Logging of a run: metrics, log.jsonl, trackers, loss.png and report.html."""
