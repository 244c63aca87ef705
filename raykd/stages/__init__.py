"""The verbs: load, plan, score, train, tune, export, report, doctor."""
