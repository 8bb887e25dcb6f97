"""The check before a run: plain verdicts on the user's own models and first records, measured without leaving a trace."""
